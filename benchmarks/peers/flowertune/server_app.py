from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import get_parameters, load_model, load_processor, load_rows, set_parameters, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context):
    cfg = dict(context.run_config)
    model, processor = load_model(cfg), load_processor(cfg)
    rows = load_rows(Path(cfg["data"]), "test")[: cfg["test-samples"]]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round not in (0, cfg["rounds"]):
            return MetricRecord({})
        set_parameters(model, arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": test(model, processor, rows)})

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    return strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_parameters(model)),
        train_config=ConfigRecord(cfg),
        num_rounds=cfg["rounds"],
        evaluate_fn=evaluate,
    )
