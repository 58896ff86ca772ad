"""The schema's history; applied to every shard by :mod:`services.api.schema`."""
