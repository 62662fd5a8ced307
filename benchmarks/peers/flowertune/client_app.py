import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import get_parameters, load_model, load_processor, load_rows, set_parameters, sites, train

app = ClientApp()


@app.train()
def fit(msg: Message, context: Context):
    torch.set_num_threads(1)
    cfg = msg.content["config"]
    model, processor = load_model(cfg), load_processor(cfg)
    set_parameters(model, msg.content["arrays"].to_torch_state_dict())
    site = sites(cfg)[context.node_config["partition-id"]]
    seed = f"{cfg['seed']}-{site.name}-{cfg['server-round']}"
    loss, count = train(model, processor, load_rows(site, "train"), cfg, seed)
    arrays = ArrayRecord(get_parameters(model))
    metrics = MetricRecord({"train_loss": loss, "num-examples": count})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
