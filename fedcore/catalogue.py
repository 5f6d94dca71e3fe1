"""The plug-ins that come with fedcore: what each name in an experiment file stands for.

Everything is a string, so that naming a strategy imports nothing but that strategy.
"""
from typing import NamedTuple


class Entry(NamedTuple):
    """A built-in plug-in.

    Attributes:
        target: where it is, `module:Class`.
        kind: strategies only: who decides what happens when (`rounds`, `events`, `peers`), and whose code it is.
        paper: where it was published.
        summary: what it does, when its own docstring does not say so in one line.
    """

    target: str
    kind: str = ""
    paper: str = ""
    summary: str = ""


_FLOWER = "flwr.serverapp.strategy"
_FEEDBACK = "fedcore.strategies.error_feedback"
_ZEROTH = "fedcore.strategies.zeroth_order"
_FLOWER_KIND = "rounds, from Flower"
_PRIVATE = "fedcore.strategies.dp_baselines"
_DP = f"{_FLOWER}:DifferentialPrivacy"

STRATEGIES = {
    "fedcompass": Entry("fedcore.strategies.fedcompass:FedCompass", "events", "Li et al., 2024, arXiv:2309.14675"),
    "fedfix": Entry("fedcore.strategies.fedfix:FedFix", "events", "Fraboni et al., 2023, JMLR 24:110"),
    "fedasync": Entry("fedcore.strategies.fedasync:FedAsync", "events", "Xie et al., 2019, arXiv:1903.03934"),
    "fedbuff": Entry("fedcore.strategies.fedbuff:FedBuff", "events", "Nguyen et al., 2022, arXiv:2106.06639"),
    "econtrol": Entry("fedcore.strategies.econtrol:EControl", "rounds", "Gao et al., 2024, arXiv:2311.05645"),
    "ef21": Entry(f"{_FEEDBACK}:Ef21", "rounds", "Richtarik et al., 2021, arXiv:2106.05203"),
    "ef21_sgdm": Entry(f"{_FEEDBACK}:Ef21Sgdm", "rounds", "Fatkhullin et al., 2023, arXiv:2305.15155"),
    "ef14": Entry(f"{_FEEDBACK}:Ef14", "rounds", "Stich et al., 2018, arXiv:1809.07599"),
    "compressed_sgd": Entry(f"{_FEEDBACK}:CompressedSgd", "rounds", "Alistarh et al., 2017, arXiv:1610.02132"),
    "dadao": Entry("fedcore.strategies.dadao:Dadao", "peers", "Nabli and Oyallon, 2023, arXiv:2208.00779"),
    "a2cid2": Entry("fedcore.strategies.a2cid2:A2Cid2", "peers", "Nabli et al., 2023, arXiv:2306.08289"),
    "gossip_sgd": Entry("fedcore.strategies.gossip_sgd:GossipSgd", "peers", "Lian et al., 2017, arXiv:1705.09056"),
    "gradient_tracking": Entry(
        "fedcore.strategies.gradient_tracking:GradientTracking", "peers", "Nedic et al., 2017, arXiv:1607.03218"),
    "distributed_sgd": Entry(f"{_FEEDBACK}:DistributedSgd", "rounds", "Chen et al., 2016, arXiv:1604.00981"),
    "diff2": Entry("fedcore.strategies.diff2:Diff2", "rounds", "Murata and Suzuki, 2023, arXiv:2302.03884"),
    "dp_gd": Entry(f"{_PRIVATE}:DpGd", "rounds", "Abadi et al., 2016, arXiv:1607.00133"),
    "dp_sgd": Entry(f"{_PRIVATE}:DpSgd", "rounds", "Abadi et al., 2016, arXiv:1607.00133"),
    "dp_srm": Entry(f"{_PRIVATE}:DpSrm", "rounds", "Cutkosky and Orabona, 2019, arXiv:1905.10018"),
    "noloco": Entry("fedcore.strategies.noloco:NoLoCo", "peers", "Kolehmainen et al., 2025, arXiv:2506.10911"),
    "fzoos": Entry("fedcore.strategies.fzoos:FZooS", "rounds", "Shu et al., 2023, arXiv:2308.04077"),
    "fedzo": Entry(f"{_ZEROTH}:FedZo", "rounds", "Fang et al., 2022, arXiv:2201.09531"),
    "fedprox_zo": Entry(f"{_ZEROTH}:FedProxZo", "rounds", "Li et al., 2020, arXiv:1812.06127"),
    "scaffold_zo_1": Entry(f"{_ZEROTH}:ScaffoldZo1", "rounds", "Karimireddy et al., 2020, arXiv:1910.06378"),
    "scaffold_zo_2": Entry(f"{_ZEROTH}:ScaffoldZo2", "rounds", "Karimireddy et al., 2020, arXiv:1910.06378"),
    "diloco": Entry("fedcore.strategies.diloco:DiLoCo", "peers", "Douillard et al., 2023, arXiv:2311.08105"),
    "co2": Entry("fedcore.strategies.co2:Co2", "peers", "Sun et al., 2024, arXiv:2401.16265"),
    "slowmo": Entry("fedcore.strategies.local_sgd:SlowMo", "peers", "Wang et al., 2020, arXiv:1910.00643"),
    "local_sgd": Entry("fedcore.strategies.local_sgd:LocalSgd", "peers", "Stich, 2019, arXiv:1805.09767"),
    "all_reduce_sgd": Entry(
        "fedcore.strategies.all_reduce_sgd:AllReduceSgd", "peers", "Chen et al., 2016, arXiv:1604.00981"
    ),
    "fedavg": Entry(
        f"{_FLOWER}:FedAvg", _FLOWER_KIND, "McMahan et al., 2017, arXiv:1602.05629",
        "Federated averaging: the mean of all clients' models, weighted by examples.",
    ),
    "fedprox": Entry(
        f"{_FLOWER}:FedProx", _FLOWER_KIND, "Li et al., 2020, arXiv:1812.06127",
        "Federated averaging; clients are pulled back towards the model they were given.",
    ),
    "fedavgm": Entry(
        f"{_FLOWER}:FedAvgM", _FLOWER_KIND, "Hsu et al., 2019, arXiv:1909.06335",
        "Federated averaging with momentum at the server.",
    ),
    "fedadam": Entry(
        f"{_FLOWER}:FedAdam", _FLOWER_KIND, "Reddi et al., 2021, arXiv:2003.00295",
        "The mean update goes through Adam at the server.",
    ),
    "fedyogi": Entry(
        f"{_FLOWER}:FedYogi", _FLOWER_KIND, "Reddi et al., 2021, arXiv:2003.00295",
        "The mean update goes through Yogi at the server.",
    ),
    "fedadagrad": Entry(
        f"{_FLOWER}:FedAdagrad", _FLOWER_KIND, "Reddi et al., 2021, arXiv:2003.00295",
        "The mean update goes through Adagrad at the server.",
    ),
    "krum": Entry(
        f"{_FLOWER}:Krum", _FLOWER_KIND, "Blanchard et al., 2017, arXiv:1703.02757",
        "The one model that is closest to its neighbours, against malicious clients.",
    ),
    "multikrum": Entry(
        f"{_FLOWER}:MultiKrum", _FLOWER_KIND, "Blanchard et al., 2017, arXiv:1703.02757",
        "The mean of the models closest to their neighbours, against malicious clients.",
    ),
    "bulyan": Entry(
        f"{_FLOWER}:Bulyan", _FLOWER_KIND, "El Mhamdi et al., 2018, arXiv:1802.07927",
        "Krum's selection, then a trimmed mean, against malicious clients.",
    ),
    "fedmedian": Entry(
        f"{_FLOWER}:FedMedian", _FLOWER_KIND, "Yin et al., 2018, arXiv:1803.01498",
        "The coordinate-wise median of all clients' models.",
    ),
    "fedtrimmedavg": Entry(
        f"{_FLOWER}:FedTrimmedAvg", _FLOWER_KIND, "Yin et al., 2018, arXiv:1803.01498",
        "The coordinate-wise mean without the largest and smallest values.",
    ),
    "qfedavg": Entry(
        f"{_FLOWER}:QFedAvg", _FLOWER_KIND, "Li et al., 2020, arXiv:1905.10497",
        "Clients with a higher loss weigh more, for equal quality among clients.",
    ),
    "dp_server_fixed_clipping": Entry(
        f"{_DP}ServerSideFixedClipping", _FLOWER_KIND, "McMahan et al., 2018, arXiv:1710.06963",
        "Central differential privacy around another strategy; the server clips, to a fixed norm.",
    ),
    "dp_client_fixed_clipping": Entry(
        f"{_DP}ClientSideFixedClipping", _FLOWER_KIND, "McMahan et al., 2018, arXiv:1710.06963",
        "Central differential privacy around another strategy; clients clip with Flower's fixed-clipping mod.",
    ),
    "dp_server_adaptive_clipping": Entry(
        f"{_DP}ServerSideAdaptiveClipping", _FLOWER_KIND, "Andrew et al., 2021, arXiv:1905.03871",
        "Central differential privacy around another strategy; the server clips, to a norm it learns.",
    ),
    "dp_client_adaptive_clipping": Entry(
        f"{_DP}ClientSideAdaptiveClipping", _FLOWER_KIND, "Andrew et al., 2021, arXiv:1905.03871",
        "Central differential privacy around another strategy; clients clip with Flower's adaptive-clipping mod.",
    ),
}

_TASKS, _PARTITIONS, _MODELS = "fedcore.clients.tasks", "fedcore.clients.partitions", "fedcore.clients.models"
_DISTRIBUTIONS, _AVAILABILITY = "fedcore.simulations.distributions", "fedcore.simulations.availability"
_COMPRESSION, _TOPOLOGIES = "fedcore.compression", "fedcore.topologies"
_SCHEDULES, _TORCH_SCHEDULES = "fedcore.clients.schedules", "torch.optim.lr_scheduler"

CATALOGUE: dict[str, dict[str, Entry]] = {
    "strategies": STRATEGIES,
    "tasks": {
        "digits": Entry(f"{_TASKS}.digits:Digits"),
        "mnist": Entry(f"{_TASKS}.images:Mnist"),
        "cifar10": Entry(f"{_TASKS}.images:Cifar10"),
        "shakespeare": Entry(f"{_TASKS}.text:Shakespeare"),
        "housing": Entry(f"{_TASKS}.tables:Housing"),
        "quadratic": Entry(f"{_TASKS}.analytic:Quadratic"),
        "logistic": Entry(f"{_TASKS}.analytic:Logistic"),
        "simulated": Entry(f"{_TASKS}.simulated:Simulated"),
        "blackbox": Entry(f"{_TASKS}.blackbox:OwnFunction"),
        "blackbox_quadratics": Entry(f"{_TASKS}.blackbox_quadratics:BlackBoxQuadratics"),
        "blackbox_metric": Entry(f"{_TASKS}.blackbox_metric:MetricTuning"),
        "blackbox_attack": Entry(f"{_TASKS}.blackbox_attack:Attack"),
    },
    "partitions": {
        "iid": Entry(f"{_PARTITIONS}:Iid"),
        "contiguous": Entry(f"{_PARTITIONS}:Contiguous"),
        "dirichlet": Entry(f"{_PARTITIONS}:Dirichlet"),
        "dual_dirichlet": Entry(f"{_PARTITIONS}:DualDirichlet"),
        "classes": Entry(f"{_PARTITIONS}:Classes"),
        "by_key": Entry(f"{_PARTITIONS}:ByKey"),
    },
    "models": {
        "logistic": Entry(f"{_MODELS}:Logistic"),
        "mlp": Entry(f"{_MODELS}:Mlp"),
        "cnn": Entry(f"{_MODELS}:Cnn"),
        "lstm": Entry(f"{_MODELS}:CharLstm"),
        "transformer": Entry(f"{_MODELS}:CharTransformer"),
    },
    "optimizers": {
        "sgd": Entry("torch.optim:SGD", summary="Stochastic gradient descent, with or without momentum."),
        "adam": Entry("torch.optim:Adam", summary="Steps scaled by running means of the gradient and its square."),
        "adamw": Entry("torch.optim:AdamW", summary="Adam with weight decay apart from the gradient."),
        "nadam": Entry("torch.optim:NAdam", summary="Adam with Nesterov momentum."),
        "radam": Entry("torch.optim:RAdam", summary="Adam that corrects the variance of its first steps."),
        "adamax": Entry("torch.optim:Adamax", summary="Adam with the largest past gradient as the scale."),
        "adagrad": Entry("torch.optim:Adagrad", summary="Steps scaled by the sum of squared gradients."),
        "adadelta": Entry("torch.optim:Adadelta", summary="Steps scaled by running means of gradients and steps."),
        "rmsprop": Entry("torch.optim:RMSprop", summary="Steps scaled by the running mean of squared gradients."),
        "rprop": Entry("torch.optim:Rprop", summary="Steps that follow the gradient's sign only."),
        "asgd": Entry("torch.optim:ASGD", summary="Stochastic gradient descent with a decaying rate."),
    },
    "schedules": {
        "constant": Entry(f"{_SCHEDULES}:Constant"),
        "cosine": Entry(f"{_SCHEDULES}:Cosine"),
        "step": Entry(f"{_TORCH_SCHEDULES}:StepLR", summary="Multiply by gamma every step_size positions."),
        "multi_step": Entry(f"{_TORCH_SCHEDULES}:MultiStepLR", summary="Multiply by gamma at each milestone."),
        "linear": Entry(f"{_TORCH_SCHEDULES}:LinearLR", summary="A straight line between two factors."),
        "exponential": Entry(f"{_TORCH_SCHEDULES}:ExponentialLR", summary="Multiply by gamma at every position."),
        "polynomial": Entry(f"{_TORCH_SCHEDULES}:PolynomialLR", summary="Fall to zero as a power of what is left."),
        "cosine_restarts": Entry(
            f"{_TORCH_SCHEDULES}:CosineAnnealingWarmRestarts", summary="Half a cosine down, again and again."
        ),
        "one_cycle": Entry(f"{_TORCH_SCHEDULES}:OneCycleLR", summary="One rise and one fall over total_steps."),
        "cyclic": Entry(f"{_TORCH_SCHEDULES}:CyclicLR", summary="Up and down between two rates."),
    },
    "distributions": {
        "constant": Entry(f"{_DISTRIBUTIONS}:Constant"),
        "uniform": Entry(f"{_DISTRIBUTIONS}:Uniform"),
        "normal": Entry(f"{_DISTRIBUTIONS}:Normal"),
        "lognormal": Entry(f"{_DISTRIBUTIONS}:LogNormal"),
        "exponential": Entry(f"{_DISTRIBUTIONS}:Exponential"),
        "trace": Entry(f"{_DISTRIBUTIONS}:Trace"),
    },
    "availability": {
        "always": Entry(f"{_AVAILABILITY}:Always"),
        "markov": Entry(f"{_AVAILABILITY}:Markov"),
        "trace": Entry(f"{_AVAILABILITY}:Trace"),
    },
    "compressors": {
        "identity": Entry(f"{_COMPRESSION}.dense:Identity"),
        "top_k": Entry(f"{_COMPRESSION}.sparse:TopK"),
        "rand_k": Entry(f"{_COMPRESSION}.sparse:RandK"),
        "sign": Entry(f"{_COMPRESSION}.quantised:Sign"),
        "qsgd": Entry(f"{_COMPRESSION}.quantised:Qsgd"),
        "natural": Entry(f"{_COMPRESSION}.quantised:Natural"),
        "power_sgd": Entry(f"{_COMPRESSION}.dense:PowerSgd"),
    },
    "graphs": {
        "complete": Entry(f"{_TOPOLOGIES}:Complete"),
        "ring": Entry(f"{_TOPOLOGIES}:Ring"),
        "star": Entry(f"{_TOPOLOGIES}:Star"),
        "path": Entry(f"{_TOPOLOGIES}:Line"),
        "grid": Entry(f"{_TOPOLOGIES}:Grid"),
        "torus": Entry(f"{_TOPOLOGIES}:Torus"),
        "hypercube": Entry(f"{_TOPOLOGIES}:Hypercube"),
        "exponential": Entry(f"{_TOPOLOGIES}:Exponential"),
        "random_regular": Entry(f"{_TOPOLOGIES}:RandomRegular"),
        "random_geometric": Entry(f"{_TOPOLOGIES}:RandomGeometric"),
        "barbell": Entry(f"{_TOPOLOGIES}:Barbell"),
        "file": Entry(f"{_TOPOLOGIES}:FromFile"),
    },
}

# Where a plug-in of each kind is named in an experiment file.
PATHS = {
    "strategies": "strategy",
    "tasks": "task",
    "partitions": "clients.partition",
    "models": "task.model",
    "optimizers": "train.optimizer",
    "schedules": "train.schedule",
    "distributions": "simulation.devices.seconds_per_step",
    "availability": "simulation.availability",
    "compressors": "strategy.compressor",
    "graphs": "strategy.graph",
}

# Constructor arguments that fedcore fills in itself; a file cannot give them.
PROVIDED = {
    "availability": ("seed", "num_nodes"),
    "models": ("input_shape", "num_outputs"),
    "optimizers": ("params", "lr"),
    "schedules": ("optimizer", "last_epoch"),
    "tasks": ("num_clients", "seed"),
}

# Settings that belong to the place and not to the plug-in's constructor.
BESIDES = {"schedules": ("unit",), "compressors": ("error_feedback",)}

# Where an experiment's other sections are tried out, because the ranges of their settings are known there.
TASK_TRIAL = "fedcore.clients.build:try_task"
TRAIN_TRIAL = "fedcore.clients.settings:TrainSettings"
OPTIMIZER_TRIAL = "fedcore.clients.optim:OptimizerFactory"
SCHEDULE_TRIAL = "fedcore.clients.schedules:make_schedule"
COMPRESSION_TRIAL = "fedcore.compressed:Compression"
SIMULATION_TRIALS = {
    "devices": "fedcore.simulations.devices:Devices",
    "network": "fedcore.simulations.network:Network",
    "availability": "fedcore.simulations.availability:Availability",
    "failures": "fedcore.simulations.failures:Failures",
}

# What a plug-in of each kind has to be, where that can be said in one class.
EXPECTED = {
    "strategies": ("flwr.serverapp.strategy:Strategy", "a Flower Strategy"),
    "compressors": ("fedcore.compression.base:Compressor", "a Compressor"),
    "graphs": (f"{_TOPOLOGIES}:Topology", "a Topology"),
}
