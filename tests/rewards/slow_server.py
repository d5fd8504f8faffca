"""A judge that takes a fifth of a second: it scores an answer that is a number by that number.  slow_server.py PORT"""

import http.server
import json
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/reward`."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.2)
        score = int(asked["response"]) / 1000
        body = json.dumps({"score": score, "scores": [score], "label_mass": 1.0}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Takes a port again that was just in use."""

    request_queue_size = 64


server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
sys.stdout.write("ready\n")
sys.stdout.flush()
server.serve_forever()
