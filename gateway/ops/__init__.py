"""What operators do: pauses, kicks, dead letters, and the jobs behind them."""
