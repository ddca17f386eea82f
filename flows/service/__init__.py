"""The Prefect server and the workers of a home.

home.py      the folder with the notes and the secret
server.py    find, start and stop the server
serve.py     the process of the server
workers.py   keep a worker running for each pool
"""
