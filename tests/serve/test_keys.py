"""Keys: what is kept of them, when they open, and when they no longer do."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace

import pytest

from vz_ray import cli
from vz_ray.observe.errors import UserError
from vz_ray.serve.keys import KeyRing, add_key, as_variable, new_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def added(file, name="alice", **changes):
    secret, key = new_key(name)
    add_key(file, replace(key, **changes))
    return secret


def test_a_key_opens_until_it_is_revoked_while_the_ring_is_in_use(file):
    alice, bob = added(file), added(file, "bob")
    ring = KeyRing(file)
    assert [ring.check(secret).name for secret in (alice, bob)] == ["alice", "bob"]
    revoke_key(file, "alice")
    assert ring.check(alice) is None
    assert ring.check(bob).name == "bob"
    carol = added(file, "carol")
    assert ring.check(carol).name == "carol"


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
    ring = KeyRing(file)
    assert ring.check(wrong) is None
    assert ring.check(secret + "a") is None
    assert ring.check(secret[:-1]) is None
    assert ring.check(read_keys(file)[0].hash) is None


def test_an_expired_key_opens_nothing(file):
    secret = added(file, expires_at=1.0)
    assert KeyRing(file).check(secret) is None
    assert KeyRing(file).open_session(secret, 1) is None


def test_the_environment_holds_keys_too(file):
    (secret, key), (late, expired) = new_key("pod"), new_key("late")
    told = f"{as_variable(key)}, {as_variable(replace(expired, expires_at=1.0))}"
    ring = KeyRing.configured("", "KEYS", {"KEYS": told})
    assert ring.check(secret).name == "pod"
    assert ring.check(late) is None
    assert KeyRing.configured("", "KEYS", {"OTHER": told}) is None
    with pytest.raises(UserError, match="there are no keys at"):
        KeyRing.configured(str(file), "KEYS", {})


def test_a_key_put_where_its_hash_belongs_is_refused_and_not_repeated():
    secret, _ = new_key("pod")
    for told in (secret, f"pod:{secret}"):
        with pytest.raises(UserError, match="entry 1") as caught:
            KeyRing(None, told)
        assert secret not in str(caught.value)


def test_a_session_ends_with_its_time_and_with_its_key(file):
    secret = added(file)
    ring = KeyRing(file)
    cookie, key = ring.open_session(secret, 1)
    assert ring.check_session(cookie) == key
    assert KeyRing(file).check_session(cookie) == key  # another server of the same keys
    ended, _ = ring.open_session(secret, -1)
    assert ring.check_session(ended) is None
    revoke_key(file, "alice")
    assert ring.check_session(cookie) is None


def test_a_cookie_is_not_a_key_and_cannot_be_changed(file):
    secret = added(file)
    ring = KeyRing(file)
    cookie, key = ring.open_session(secret, 1)
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
        assert ring.check_session(changed) is None
    assert ring.check(told) is None
    assert ring.check(cookie) is None


def test_a_file_that_breaks_while_it_is_in_use_opens_nothing(file):
    secret = added(file)
    ring = KeyRing(file)
    good = file.read_bytes()
    file.write_text("{")
    assert ring.check(secret) is None
    file.write_bytes(good)
    assert ring.check(secret) is not None
    file.unlink()
    assert ring.check(secret) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "hash": "b"}]}']
)
def test_a_broken_file_is_named(file, text):
    file.write_text(text)
    with pytest.raises(UserError, match=r"keys\.json is no file of keys"):
        KeyRing(file)


def test_a_file_that_others_may_write_to_is_refused(file):
    added(file)
    os.chmod(file, 0o620)
    with pytest.raises(UserError, match="may be written by others"):
        KeyRing(file)


def test_names_are_given_once(file):
    added(file)
    with pytest.raises(UserError, match="has a key named alice"):
        added(file)
    with pytest.raises(UserError, match="no key named bob; it has alice"):
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
    assert KeyRing(file).check(secret).name == "alice"
    assert run(monkeypatch, "keys", "list", "--file", str(file)) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("alice  made ")
    assert "expires" in listed
    assert secret not in listed
    assert run(monkeypatch, "keys", "list", "--hashes", "--file", str(file)) == 0
    assert KeyRing(None, capsys.readouterr().out).check(secret).name == "alice"
    assert run(monkeypatch, "keys", "revoke", "alice", "--file", str(file)) == 0
    assert KeyRing(file).check(secret) is None
    assert run(monkeypatch, "keys", "create", "two words", "--file", str(file)) == 2
    assert "named 'two words'" in capsys.readouterr().err
