__version__ = "0.1.0"

from pc_transformer.config import ModelConfig
from pc_transformer.inference import generate
from pc_transformer.model import PCTransformer, convert
from pc_transformer.training import load, save

__all__ = ["ModelConfig", "PCTransformer", "convert", "generate", "load", "save"]
