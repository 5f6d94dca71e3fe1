"""What runs on the server: Flower's FedAvg."""
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, evaluating every round on the digits that no client has."""
    torch.set_num_threads(1)
    config = context.run_config
    model = task.make_model(int(config["seed"]))
    test_set = task.load_test_set()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = task.test(model, test_set)
        print(f"round {server_round}: loss {loss:.4f}, accuracy {accuracy:.3f}")
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg(fraction_train=float(config["fraction-train"]), fraction_evaluate=0.5, min_available_nodes=2)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=int(config["num-server-rounds"]),
                            evaluate_fn=evaluate)
    if config["save-model"]:
        torch.save(result.arrays.to_torch_state_dict(), str(config["save-model"]))
