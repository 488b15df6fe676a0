"""Test the health check: a server whose device thread has ended must be restarted."""

from transformer.engine import device


def test_health_is_503_after_the_device_thread_has_ended(http, monkeypatch):
    assert http.get("/health").json() == {"status": "ok"}
    dead = device.Device()
    dead.close()
    monkeypatch.setattr(device, "default_device", lambda: dead)
    response = http.get("/health")
    assert response.status_code == 503 and response.json()["status"] != "ok"
