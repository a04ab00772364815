"""MLflow's own server application on a port of loopback: ``mlflow_server.py PORT``.

MLflow's command starts it in ten seconds with workers of its own; forked by fork_server.py, which
has it imported, it is there in a moment, and is killed and started again as often as a test wants.
"""

import sys

from mlflow.server import app
from werkzeug.serving import make_server

if __name__ == "__main__":
    make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
