"""The configuration: one tree, one YAML file, the same names as flags."""
