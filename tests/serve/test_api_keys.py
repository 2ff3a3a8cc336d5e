"""API keys: stored hashes, validity, sessions."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import pytest

from tests.command_line import run_command
from vz_ray.serve.api_keys import ApiKeyStore, add_key, format_key_env, generate_key, load_keys, revoke_key
from vz_ray.utils.errors import UserError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def added(file, name="alice", **changes):
    secret, key = generate_key(name)
    add_key(file, replace(key, **changes))
    return secret


def test_key_is_valid_until_revoked(file):
    alice, bob = added(file), added(file, "bob")
    ring = ApiKeyStore(file)
    assert [ring.verify(secret).name for secret in (alice, bob)] == ["alice", "bob"]
    revoke_key(file, "alice")
    assert ring.verify(alice) is None
    assert ring.verify(bob).name == "bob"
    carol = added(file, "carol")
    assert ring.verify(carol).name == "carol"


def test_file_has_only_hashes_and_mode_0600(file):
    secret = added(file)
    text = file.read_text()
    assert secret not in text
    assert secret[3:] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("wrong", ["", "vz-", "nonsense", "é" * 40, "a" * 10_000])
def test_invalid_keys_are_rejected(file, wrong):
    secret = added(file)
    ring = ApiKeyStore(file)
    assert ring.verify(wrong) is None
    assert ring.verify(secret + "a") is None
    assert ring.verify(secret[:-1]) is None
    assert ring.verify(load_keys(file)[0].hash) is None


def test_expired_key_is_rejected(file):
    secret = added(file, expires_at=1.0)
    assert ApiKeyStore(file).verify(secret) is None
    assert ApiKeyStore(file).create_session(secret, 1) is None


def test_keys_from_environment(file):
    (secret, key), (late, expired) = generate_key("pod"), generate_key("late")
    value = f"{format_key_env(key)}, {format_key_env(replace(expired, expires_at=1.0))}"
    ring = ApiKeyStore.from_config("", "KEYS", {"KEYS": value})
    assert ring.verify(secret).name == "pod"
    assert ring.verify(late) is None
    assert ApiKeyStore.from_config("", "KEYS", {"OTHER": value}) is None
    with pytest.raises(UserError, match="does not exist; create a key"):
        ApiKeyStore.from_config(str(file), "KEYS", {})


def test_secret_in_environment_is_refused_and_not_printed():
    secret, _ = generate_key("pod")
    for value in (secret, f"pod:{secret}"):
        with pytest.raises(UserError, match="entry 1") as caught:
            ApiKeyStore(None, value)
        assert secret not in str(caught.value)


def test_session_ends_at_expiry_and_revocation(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    cookie, key = ring.create_session(secret, 1)
    assert ring.verify_session(cookie) == key
    assert ApiKeyStore(file).verify_session(cookie) == key  # a second server with the same keys
    expired_cookie, _ = ring.create_session(secret, -1)
    assert ring.verify_session(expired_cookie) is None
    revoke_key(file, "alice")
    assert ring.verify_session(cookie) is None


def test_cookie_is_no_key_and_is_signed(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    cookie, key = ring.create_session(secret, 1)
    assert secret not in cookie
    value, expires, signature = cookie.split(".")
    for changed in (
        f"{value}.{int(expires) + 1}.{signature}",
        f"{value}.{expires}.{'0' * 64}",
        f"{key.hash[64:]}.{expires}.{signature}",
        f"{value}.{expires}",
        "",
        "..",
        "é.1.2",
        f"{value}.٣.{signature}",
    ):
        assert ring.verify_session(changed) is None
    assert ring.verify(value) is None
    assert ring.verify(cookie) is None


def test_broken_file_invalidates_its_keys(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    good = file.read_bytes()
    file.write_text("{")
    assert ring.verify(secret) is None
    file.write_bytes(good)
    assert ring.verify(secret) is not None
    file.unlink()
    assert ring.verify(secret) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "hash": "b"}]}'])
def test_invalid_file_is_named(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match=r"keys\.json is not a keys file"):
        ApiKeyStore(file)


def test_file_writable_by_others_is_refused(file):
    added(file)
    os.chmod(file, 0o620)
    with pytest.raises(UserError, match="is writable by other users"):
        ApiKeyStore(file)


def test_key_names_are_unique(file):
    added(file)
    with pytest.raises(UserError, match="already has a key named alice"):
        added(file)
    with pytest.raises(UserError, match="no key named bob; existing keys: alice"):
        revoke_key(file, "bob")
    assert json.loads(file.read_text())["keys"][0]["name"] == "alice"


def test_cli_prints_a_key_once(monkeypatch, capsys, file):
    assert run_command(monkeypatch, "keys", "create", "alice", "--file", str(file), "--days", "9") == 0
    secret = capsys.readouterr().out.strip()
    assert ApiKeyStore(file).verify(secret).name == "alice"
    assert run_command(monkeypatch, "keys", "list", "--file", str(file)) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("alice  created ")
    assert "expires" in listed
    assert secret not in listed
    assert run_command(monkeypatch, "keys", "list", "--hashes", "--file", str(file)) == 0
    assert ApiKeyStore(None, capsys.readouterr().out).verify(secret).name == "alice"
    assert run_command(monkeypatch, "keys", "revoke", "alice", "--file", str(file)) == 0
    assert ApiKeyStore(file).verify(secret) is None
    assert run_command(monkeypatch, "keys", "create", "two words", "--file", str(file)) == 2
    assert "name is 'two words'" in capsys.readouterr().err
