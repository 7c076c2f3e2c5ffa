"""Early weight averaging (LAWA): the mean of recent snapshots of this rank's own fp32 master weights."""
