"""Path from configuration to finished runs: schema, composition, parts, run folders. No other package uses DictConfig."""
