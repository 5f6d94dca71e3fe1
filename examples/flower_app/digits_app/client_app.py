"""What runs on every client."""
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this client's digits."""
    torch.set_num_threads(1)
    config, partition = context.run_config, int(context.node_config["partition-id"])
    data = task.load_partition(partition, int(context.node_config["num-partitions"]))
    model = task.make_model(int(config["seed"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    # A seed of its own for each client and round, so that every engine draws the same batches.
    seed = 1000 * int(message.content["config"]["server-round"]) + partition
    epochs, lr, batch_size = int(config["local-epochs"]), float(config["lr"]), int(config["batch-size"])
    loss, steps = task.train(model, data, epochs, lr, batch_size, seed)
    # fedcore's simulator reads "work-steps": a client that does more steps takes longer. Flower ignores it.
    metrics = MetricRecord({"num-examples": len(data), "train_loss": loss, "work-steps": steps})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this client's digits."""
    torch.set_num_threads(1)
    partition, num_partitions = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    data = task.load_partition(partition, num_partitions)
    model = task.make_model(int(context.run_config["seed"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss, accuracy = task.test(model, data)
    metrics = MetricRecord({"num-examples": len(data), "eval_loss": loss, "eval_acc": accuracy, "work-steps": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
