"""What is logged and drawn as a run goes: signals, alarms, sample grids, trackers."""
