"""What an event is: schema, codecs, rules, COPY lines. Pure: no I/O, no clock."""
