"""Keys: what is kept of them, when they open, and when they no longer do."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace

import pytest

from vz_ray import cli
from vz_ray.serve.api_keys import ApiKeyStore, add_key, format_key_env, generate_key, load_keys, revoke_key
from vz_ray.utils.errors import UserError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def added(file, name="alice", **changes):
    secret, key = generate_key(name)
    add_key(file, replace(key, **changes))
    return secret


def test_a_key_opens_until_it_is_revoked_while_the_ring_is_in_use(file):
    alice, bob = added(file), added(file, "bob")
    ring = ApiKeyStore(file)
    assert [ring.verify(secret).name for secret in (alice, bob)] == ["alice", "bob"]
    revoke_key(file, "alice")
    assert ring.verify(alice) is None
    assert ring.verify(bob).name == "bob"
    carol = added(file, "carol")
    assert ring.verify(carol).name == "carol"


def test_only_hashes_are_kept_and_only_the_owner_may_read_them(file):
    secret = added(file)
    text = file.read_text()
    assert secret not in text
    assert secret[3:] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("wrong", ["", "vz-", "nonsense", "é" * 40, "a" * 10_000])
def test_what_is_no_key_opens_nothing(file, wrong):
    secret = added(file)
    ring = ApiKeyStore(file)
    assert ring.verify(wrong) is None
    assert ring.verify(secret + "a") is None
    assert ring.verify(secret[:-1]) is None
    assert ring.verify(load_keys(file)[0].hash) is None


def test_an_expired_key_opens_nothing(file):
    secret = added(file, expires_at=1.0)
    assert ApiKeyStore(file).verify(secret) is None
    assert ApiKeyStore(file).create_session(secret, 1) is None


def test_the_environment_holds_keys_too(file):
    (secret, key), (late, expired) = generate_key("pod"), generate_key("late")
    told = f"{format_key_env(key)}, {format_key_env(replace(expired, expires_at=1.0))}"
    ring = ApiKeyStore.from_config("", "KEYS", {"KEYS": told})
    assert ring.verify(secret).name == "pod"
    assert ring.verify(late) is None
    assert ApiKeyStore.from_config("", "KEYS", {"OTHER": told}) is None
    with pytest.raises(UserError, match="does not exist; create a key"):
        ApiKeyStore.from_config(str(file), "KEYS", {})


def test_a_key_put_where_its_hash_belongs_is_refused_and_not_repeated():
    secret, _ = generate_key("pod")
    for told in (secret, f"pod:{secret}"):
        with pytest.raises(UserError, match="entry 1") as caught:
            ApiKeyStore(None, told)
        assert secret not in str(caught.value)


def test_a_session_ends_with_its_time_and_with_its_key(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    cookie, key = ring.create_session(secret, 1)
    assert ring.verify_session(cookie) == key
    assert ApiKeyStore(file).verify_session(cookie) == key  # another server of the same keys
    ended, _ = ring.create_session(secret, -1)
    assert ring.verify_session(ended) is None
    revoke_key(file, "alice")
    assert ring.verify_session(cookie) is None


def test_a_cookie_is_not_a_key_and_cannot_be_changed(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    cookie, key = ring.create_session(secret, 1)
    assert secret not in cookie
    told, expires, signature = cookie.split(".")
    for changed in (
        f"{told}.{int(expires) + 1}.{signature}",
        f"{told}.{expires}.{'0' * 64}",
        f"{key.hash[64:]}.{expires}.{signature}",
        f"{told}.{expires}",
        "",
        "..",
        "é.1.2",
        f"{told}.٣.{signature}",
    ):
        assert ring.verify_session(changed) is None
    assert ring.verify(told) is None
    assert ring.verify(cookie) is None


def test_a_file_that_breaks_while_it_is_in_use_opens_nothing(file):
    secret = added(file)
    ring = ApiKeyStore(file)
    good = file.read_bytes()
    file.write_text("{")
    assert ring.verify(secret) is None
    file.write_bytes(good)
    assert ring.verify(secret) is not None
    file.unlink()
    assert ring.verify(secret) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "hash": "b"}]}']
)
def test_a_broken_file_is_named(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match=r"keys\.json is not a keys file"):
        ApiKeyStore(file)


def test_a_file_that_others_may_write_to_is_refused(file):
    added(file)
    os.chmod(file, 0o620)
    with pytest.raises(UserError, match="is writable by other users"):
        ApiKeyStore(file)


def test_names_are_given_once(file):
    added(file)
    with pytest.raises(UserError, match="already has a key named alice"):
        added(file)
    with pytest.raises(UserError, match="no key named bob; existing keys: alice"):
        revoke_key(file, "bob")
    assert json.loads(file.read_text())["keys"][0]["name"] == "alice"


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vz-ray", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_line_shows_a_key_once(monkeypatch, capsys, file):
    assert run(monkeypatch, "keys", "create", "alice", "--file", str(file), "--days", "9") == 0
    secret = capsys.readouterr().out.strip()
    assert ApiKeyStore(file).verify(secret).name == "alice"
    assert run(monkeypatch, "keys", "list", "--file", str(file)) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("alice  created ")
    assert "expires" in listed
    assert secret not in listed
    assert run(monkeypatch, "keys", "list", "--hashes", "--file", str(file)) == 0
    assert ApiKeyStore(None, capsys.readouterr().out).verify(secret).name == "alice"
    assert run(monkeypatch, "keys", "revoke", "alice", "--file", str(file)) == 0
    assert ApiKeyStore(file).verify(secret) is None
    assert run(monkeypatch, "keys", "create", "two words", "--file", str(file)) == 2
    assert "name is 'two words'" in capsys.readouterr().err
