"""Numbers that can be trusted: timers, memory, statistics, the machine, and `mmopt bench`."""
