"""The way from configuration to finished runs: schema, composition, parts, run folders. The only user of DictConfig."""
