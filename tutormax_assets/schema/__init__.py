"""The tables in a database: their state, adoption and upgrades, roles, what stands in the way."""
