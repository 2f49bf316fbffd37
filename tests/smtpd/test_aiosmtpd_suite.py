"""aiosmtpd's own tests of its server: those about the wire hold for us, too.

They come with the installed package and run in a process of their own, where a relay of ours takes the place of its
Controller. All of them run: exactly those that are listed here fail, each list with the reason why that is right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import relay

# Its parser of PROXY headers, its command line, its handlers and LMTP server are not in use here. Within the modules
# that are: what builds its SMTP object by hand, or looks at how arguments of that are checked.
NOT_RUN = ("TestProtocol", "TestAuthArgs", "TestSanitize", "TestLimits")

ELSEWHERE = {
    "HELP is one list of commands, by 214 (RFC 5321 4.2.3), whatever is asked for and before everything": [
        "TestSMTP::test_help",
        "TestSMTP::test_help_[*]",
        "TestSMTP::test_help_esmtp[*]",
        "TestSMTP::test_help_bad_arg",
        "TestRequiredAuthentication::test_help_unauthenticated",
        "TestRequiredAuthentication::test_help_authenticated",
        "TestStartTLS::test_help_starttls",
        "TestStartTLS::test_help_after_starttls",
        "TestRequireTLS::test_help_fails",
    ],
    "EHLO and the greeting say what we and the primary have": [
        "TestSMTP::test_ehlo",
        "TestAuthMechanisms::test_ehlo",
        "TestSMTPWithController::test_esmtp_no_size_limit",
        "TestCustomization::test_default_greeting",
        "TestCustomization::test_custom_greeting",
    ],
    "An address or a parameter of no extension is refused by 555 (RFC 5321 4.1.1.11), not by 501": [
        "TestSMTP::test_mail_smtp_errsyntax[params_noesmtp]",
        "TestSMTP::test_rcpt_smtp_errsyntax[params]",
        "TestStrictASCII::test_mail_param",
    ],
    "Obsolete syntax: spaces in a domain, specials outside of the quotes of an address without brackets": [
        "TestSMTP::test_mail_valid_address[18]",
        "TestSMTP::test_mail_valid_address[30]",
        "TestSMTP::test_rcpt_valid_address[18]",
        "TestSMTP::test_rcpt_valid_address[30]",
    ],
    "Which addresses there are is for the primary to say; it accepts all here": [
        "TestSMTP::test_mail_invalid_address[*]",
        "TestSMTP::test_mail_esmtp_invalid_address[*]",
        "TestSMTP::test_rcpt_invalid_address[*]",
        "TestSMTP::test_vrfy_not_address",
        "TestStrictASCII::test_bad_encoded_param",
        "TestStrictASCII::test_data",
    ],
    "QUIT with an argument is answered 221, as Postfix does": ["TestSMTP::test_quit_with_args"],
    "AUTH after HELO is out of order: 503": ["TestSMTPAuth::test_helo"],
    "PLAIN and LOGIN are the mechanisms, users are in a file: no handler, callback or mechanism of a handler": [
        "TestSMTPAuth::test_auth_loginteract_warning",
        "TestAuthMechanisms::test_custom_mechanism",
        "TestAuthMechanisms::test_byclient[*]",
        "TestAuthMechanisms::test_plain1_good_credentials",
        "TestAuthMechanisms::test_plain1_goodcreds_sanitized_log",
        "TestAuthMechanisms::test_plain2_good_credentials",
        "TestAuthMechanisms::test_login2_good_credentials",
        "TestAuthMechanisms::test_login3_good_credentials",
        "TestAuthMechanisms::test_DENYFALSE",
        "TestAuthMechanisms::test_DENYMISSING",
        "TestAuthMechanisms::test_NONE",
        "TestAuthenticator::test_success",
        "TestAuthenticator::test_fail_withmesg",
    ],
    "Without a login or TLS it is MAIL that is refused; what must follow it is out of order, the rest is answered": [
        "TestRequiredAuthentication::test_vrfy_unauthenticated",
        "TestRequiredAuthentication::test_rcpt_unauthenticated",
        "TestRequiredAuthentication::test_data_unauthenticated",
        "TestRequireTLS::test_helo_fails",
        "TestRequireTLS::test_rcpt_fails",
        "TestRequireTLS::test_vrfy_fails",
        "TestRequireTLS::test_data_fails",
    ],
    "A login by a password that our file has not": ["TestRequiredAuthentication::test_data_authenticated"],
    "It looks into the envelope of a handler, of which there is none": [
        "TestResetCommands::test_helo",
        "TestResetCommands::test_ehlo",
        "TestResetCommands::test_rset",
    ],
    "It makes a handler of aiosmtpd's fail": [
        "TestSMTPWithController::test_process_message_error",
        "TestSMTPWithController::test_unexpected_errors",
        "TestSMTPWithController::test_unexpected_errors_unhandled",
        "TestSMTPWithController::test_unexpected_errors_custom_response",
        "TestSMTPWithController::test_exception_handler_exception",
        "TestSMTPWithController::test_exception_handler_undescribable",
        "TestSMTPWithController::test_exception_handler_multiple_connections_lost",
        "TestSleepingHandler::test_close_after_helo",
        "TestStartTLS::test_failed_handshake",
        "TestTLSEnding::test_tls_handshake_failing",
    ],
    "Lines of any length pass (smtp.max_line_bytes)": [
        "TestSMTPWithController::test_data_line_too_long",
        "TestSMTPWithController::test_long_line_double_count",
        "TestSMTPWithController::test_too_long_line_delay_error",
        "TestSMTPWithController::test_too_long_lines_then_too_long_body",
    ],
    "It compares the words of a reply": ["TestSMTPWithController::test_too_long_body_delay_error"],
    "It looks into an object of aiosmtpd's, or puts a mock in its place": [
        "TestCustomization::test_limitlocalpart",
        "TestSMTPWithController::test_long_line_leak",
        "TestClientCrash::test_connection_reset_during_DATA",
        "TestClientCrash::test_connection_reset_during_command",
        "TestClientCrash::test_connection_reset_in_long_command",
        "TestClientCrash::test_close_in_command",
        "TestClientCrash::test_close_in_command_2",
        "TestClientCrash::test_close_in_long_command",
        "TestClientCrash::test_close_in_data",
        "TestClientCrash::test_sockclose_after_helo",
        "TestTLSEnding::test_eof_received",
    ],
    "A client that is too slow hears 421 before we hang up": ["TestTimeout::test_timeout"],
    "STARTTLS that is not there is 502 (RFC 5321 4.2.4)": ["TestNoTLS::test_disabled_tls"],
    "STARTTLS is not for the middle of a transaction: 503": [
        "TestTLSForgetsSessionData::test_forget_mail",
        "TestTLSForgetsSessionData::test_forget_rcpt",
    ],
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("modules", "at_least"),
    [
        pytest.param(["test_smtp"], 170, marks=pytest.mark.long),
        (["test_starttls", "test_smtps", "test_smtpsmuggling"], 12),
    ],
)
def test_its_own_tests(tmp_path: Path, modules: list[str], at_least: int) -> None:
    """All that is about SMTP holds for a relay of ours; what does not is in the list above, and nothing else is."""
    report = tmp_path / "report.xml"
    root = Path(relay.__file__).parent.parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--tb=line", "-c", os.devnull, "--rootdir", str(tmp_path)),
            *("-p", "support.aiosmtpd_adapter", "-p", "no:cacheprovider", "--timeout", "20", f"--junitxml={report}"),
            *("-k", " and ".join(f"not {name}" for name in NOT_RUN)),
            *("--pyargs", *(f"aiosmtpd.tests.{module}" for module in modules)),
        ],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SMTP_DUP_"))},
            "PYTHONPATH": os.pathsep.join((str(root), str(Path(__file__).parents[1]))),
        },
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    passed, failed = set(), set()
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        (failed if case.find("failure") is not None or case.find("error") is not None else passed).add(name)
    listed = {name for names in ELSEWHERE.values() for name in names}
    unexpected = sorted(name for name in failed if not listed & {name, f"{name.partition('[')[0]}[*]"})
    assert not unexpected, f"{unexpected}\n{done.stdout[-6000:]}"
    held = sorted(name for name in passed if listed & {name, f"{name.partition('[')[0]}[*]"})
    assert not held, f"listed as of no use to us, but they hold: {held}"
    assert len(passed) >= at_least, done.stdout[-3000:]
