"""What every package above shares: errors, artefact files, the model's shape, the hardware profile."""
