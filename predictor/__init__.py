"""Low-rank MLP predictors of which FFN neurons will fire: their training, sizing and report."""

from predictor.bank import PredictorBank
from predictor.low_rank import LowRankPredictor
from predictor.report import PredictorReport
from predictor.samples import FFNWeights
from predictor.sizing import PredictorTarget
from predictor.train import train_predictors

__all__ = [
    "FFNWeights",
    "LowRankPredictor",
    "PredictorBank",
    "PredictorReport",
    "PredictorTarget",
    "train_predictors",
]
