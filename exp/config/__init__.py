"""YAML files and flags -> one frozen ExperimentConfig. Nothing heavy is imported here."""
