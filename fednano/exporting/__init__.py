"""Take a tuned adapter elsewhere: a PEFT checkpoint, a merged model, or its own tensors."""

from fednano.exporting.run import FORMATS, Export, export_run

__all__ = ["FORMATS", "Export", "export_run"]
