"""From configuration to finished runs: schema, composition, the composition root, run folders. The only user of DictConfig."""
