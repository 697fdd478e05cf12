"""Sessions, drafters, verification and engines: numpy only."""
