"""The Prefect server and the workers of a home.

home.py      the folder with the notes and the secret
server.py    find, start and stop the server
serve.py     the process of the server
workers.py   keep the workers, the server of reports and the Prefect server running
pages.py     the server of reports
"""
