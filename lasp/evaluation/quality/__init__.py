"""What models of one corpus and one budget learn, by mixer and pattern: a table (`lasp train quality`)."""
