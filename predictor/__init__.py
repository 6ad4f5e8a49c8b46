"""Low-rank MLP predictors of which FFN neurons will fire: their training, sizing and report."""
