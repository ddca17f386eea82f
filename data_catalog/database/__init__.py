"""The catalogue's database.

address        addresses of SQLite files and databases, without their passwords
connection     connect, and run the missing migrations
schema         the tables
migrations/    one file per change of the tables
lease          exclusive leases and heartbeats: ``hold_lease``
runs           recognise the runs of killed processes
item_states    the state of each item, from the tables of a version
items          the history of item states, and the time of the next attempt to read an item
sealed_rows    rows that are copied from artifacts, checked
"""
