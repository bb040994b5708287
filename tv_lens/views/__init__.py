"""Tables, figures and the report page: how results look."""
