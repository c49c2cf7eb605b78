"""The clients of real servers, and the choice among them. What a client needs is imported when it is chosen."""

import ipaddress
import os
from urllib.parse import urlsplit

from trigger_opt.errors import UserError
from trigger_opt.transfer.client import Client
from trigger_opt.transfer.settings import TransferSettings, model_names, require_activations


def open_client(settings: TransferSettings) -> Client:
    """The client of `settings`.

    Raises:
        UserError: its key or its package is missing, `base_url` is no URL, or a model is no name.
    """
    if settings.client == "local":
        from trigger_opt.transfer.local import LocalClient

        models = {name: name for name in model_names(settings)}
        return LocalClient(models, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature)
    return _remote(settings, _key(settings))


def server_of(settings: TransferSettings) -> str:
    """What the client of `settings` calls its server (`Client.server`); needs no key and opens nothing.

    Raises:
        UserError: its package is missing, `base_url` is no URL, or a model is no name.
    """
    if settings.client == "local":
        # As LocalClient calls itself; it cannot be asked without loading the models.
        return "local " + " ".join(f"{name}={name}" for name in sorted(model_names(settings)))
    return _remote(settings, "").server


def check_client(settings: TransferSettings) -> None:
    """Whether `open_client` would succeed, before a run spends hours on what is to be sent.

    Raises:
        UserError: see `open_client`; a model the server does not have, activations of a client that has none. A key is
            not asked for where nothing is sent, or to an emulator of our own.
    """
    server_of(settings)
    require_activations(settings)
    if settings.client == "jsinfer":
        _check_aliases(settings)
    if not (settings.plan_only or settings.emulator or settings.client == "local"):
        _key(settings)


def _check_aliases(settings: TransferSettings) -> None:
    from trigger_opt.transfer.clients.jsinfer import JsinferClient

    client = JsinferClient("", settings.base_url)
    for name in model_names(settings):
        client.model_path(name)


def _remote(settings: TransferSettings, key: str) -> Client:
    variable = _variable(settings)
    if settings.client == "jsinfer":
        from trigger_opt.transfer.clients.jsinfer import JsinferClient

        return JsinferClient(key, settings.base_url, key_variable=variable)
    if settings.client == "openai":
        from trigger_opt.transfer.clients.openai_chat import OpenAIChatClient

        return OpenAIChatClient(key, settings.base_url, key_variable=variable)
    if settings.client == "openai_batch":
        from trigger_opt.transfer.clients.openai_batch import OpenAIBatchClient

        return OpenAIBatchClient(key, settings.base_url, key_variable=variable)
    raise UserError(f"transfer.client={settings.client!r} is unknown; choose jsinfer, openai, openai_batch or local")


def _key(settings: TransferSettings) -> str:
    key = (settings.api_key or os.environ.get(_variable(settings), "")).strip()
    if key or (settings.client != "jsinfer" and _on_loopback(settings.base_url)):
        return key
    # A server elsewhere that wants no key is told any word.
    raise UserError(
        f"the client {settings.client} needs a key: set the environment variable {_variable(settings)} "
        "(to any word where the server wants none), or name another in transfer.key_variable"
    )


def _variable(settings: TransferSettings) -> str:
    # One server's key must never reach another's by default.
    return settings.key_variable or ("JSINFER_API_KEY" if settings.client == "jsinfer" else "OPENAI_API_KEY")


def _on_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
