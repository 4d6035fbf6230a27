"""Encoders of other projects, and a hub on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from torch import nn


@pytest.fixture
def shaken():
    """`shaken(model)`: parameters and running statistics away from where they start; eval mode."""

    @torch.no_grad()
    def shake(model):
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.mul_(1 + torch.rand(value.shape))
            elif value.is_floating_point():
                value.add_(0.05 * torch.randn(value.shape))
        return model.eval()

    return shake


@pytest.fixture
def resnet18(shaken):
    """A torchvision ResNet without its classifier, in eval mode; with a 3x3 stem on request."""

    def make(padding=None, name="resnet18"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name)
        model.fc = nn.Identity()
        if padding is not None:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
            model.maxpool = nn.Identity()
        return shaken(model)

    return make


@pytest.fixture
def serve():
    """`serve(answer)`: the address of a server, and the list of the paths it is asked for.

    `answer(method, path, headers, body)` gives the content, bytes or JSON, and a status and
    headers where they are not 200 and none.
    """
    servers = []

    def start(answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                content, status, headers = answer(self.command, self.path, self.headers, body)
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                self.send_response(status)
                for key, value in {**headers, "Content-Length": len(content)}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
