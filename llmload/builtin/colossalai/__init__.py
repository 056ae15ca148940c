"""Models built lazily by ColossalAI, filled by streaming or left to a Booster."""
