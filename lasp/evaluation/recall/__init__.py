"""How well mixers recall: a sweep of small models over one task (`lasp train mqar`)."""
