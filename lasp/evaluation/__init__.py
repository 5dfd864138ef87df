"""What models have learnt: recall tasks, loss by position, needles, and other evaluations' view of lasp's models."""
