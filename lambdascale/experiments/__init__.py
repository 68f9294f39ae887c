"""From configuration to finished runs: schema, composition, building the parts, run folders. The only user of DictConfig."""
