"""The base of the project: texts, models and machines. It knows nothing about distillation."""

__version__ = "0.1.0"
