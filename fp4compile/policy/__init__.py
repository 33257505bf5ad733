"""Which matmul gets which numbers: ordered rules over presets, read from TOML. `load.load_policy` is the way in."""
