//! The tokens file: one line per token or client certificate, with the name and
//! the limits of its caller.
//!
//! Errors name the line, and never a word of it that may be a token.

use std::collections::HashMap;
use std::num::NonZeroU32;

use anyhow::Context as _;

use crate::files;
use crate::proto::Priority;
use crate::serve::caller::{CallerOptions, ImageRate, RatePeriod};
use crate::serve::rpc::tls::SUBJECT_LEN_MAX;

/// Shortest length of a token: 16 random letters and digits have 95 bits;
/// shorter tokens can be guessed.
const TOKEN_LEN_MIN: usize = 16;
/// Largest number of tokens and certificates, since every call is compared with
/// every token; names are therefore no more.
pub(super) const LINES_MAX: usize = 256;
/// Largest length of a name, which is in log lines and labels.
const NAME_LEN_MAX: usize = 64;
/// Largest number in an option: far above what a worker can do, and small
/// enough that the time per image of a rate is at least a microsecond.
const NUMBER_MAX: u32 = 1_000_000;

/// Beginnings of words that are options, and never a token.
const OPTIONS: [&str; 3] = ["rate=", "in-flight=", "class="];

/// Content of a tokens file.
#[derive(Debug, Default)]
pub(super) struct TokensFile<'a> {
    /// Names with their options, in the order of their first lines.
    pub(super) callers: Vec<(&'a str, CallerOptions)>,
    /// Tokens, each with the index of its caller, if it has one.
    pub(super) tokens: Vec<(&'a str, Option<usize>)>,
    /// Subjects of client certificates, each with the index of its caller.
    pub(super) subjects: HashMap<&'a str, usize>,
}

/// Facts that are known of a name while the file is read.
#[derive(Debug, Default)]
struct Seen<'a> {
    callers: HashMap<&'a str, (usize, Option<usize>)>,
    /// Line and caller of each token.
    tokens: HashMap<&'a str, (usize, Option<usize>)>,
}

/// Proof of identity in a line.
enum Proof<'a> {
    Token(&'a str),
    Certificate(&'a str),
}

impl<'a> TokensFile<'a> {
    /// Parses a file. `has_client_ca` is true if client certificates are
    /// verified.
    pub(super) fn parse(content: &'a [u8], has_client_ca: bool) -> anyhow::Result<Self> {
        let text = files::text(content).context("the file is not UTF-8 text")?;
        let (mut file, mut seen) = (Self::default(), Seen::default());
        for (idx, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = idx + 1;
            let one = file.line(&mut seen, line, number, has_client_ca);
            one.with_context(|| format!("line {number}"))?;
        }
        anyhow::ensure!(
            !file.tokens.is_empty() || !file.subjects.is_empty(),
            "the file has no token; write one token per line, with the name of its caller before it"
        );
        Ok(file)
    }

    fn line(
        &mut self,
        seen: &mut Seen<'a>,
        line: &'a str,
        number: usize,
        has_client_ca: bool,
    ) -> anyhow::Result<()> {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let (name, proof) = match words.next() {
            None => (None, proof(first)?),
            Some(second) => (Some(name(first)?), proof(second)?),
        };
        let options = options(words)?;
        anyhow::ensure!(
            self.tokens.len() + self.subjects.len() < LINES_MAX,
            "the file has more than {LINES_MAX} tokens and certificates, which is the limit"
        );
        let caller = match name {
            Some(name) => Some(self.caller(seen, name, options, number)?),
            None => None,
        };
        match (proof, caller) {
            (Proof::Token(token), caller) => {
                match seen.tokens.insert(token, (number, caller)) {
                    None => self.tokens.push((token, caller)),
                    // The same line twice says nothing new.
                    Some((_, before)) if before == caller => {}
                    Some((before, _)) => {
                        anyhow::bail!("the token is that of another caller in line {before} too");
                    }
                }
            }
            (Proof::Certificate(_), None) => {
                anyhow::bail!("a certificate needs a name before it: NAME cert=SUBJECT");
            }
            (Proof::Certificate(subject), Some(caller)) => {
                anyhow::ensure!(
                    has_client_ca,
                    "cert= needs --tls-client-ca, which verifies client certificates"
                );
                anyhow::ensure!(
                    self.subjects.insert(subject, caller).is_none(),
                    "the subject of cert= is in a line before; name it once"
                );
            }
        }
        Ok(())
    }

    /// Returns the index of a caller, and keeps its options, which stand in one
    /// line or are the same in several.
    fn caller(
        &mut self,
        seen: &mut Seen<'a>,
        name: &'a str,
        options: Option<CallerOptions>,
        number: usize,
    ) -> anyhow::Result<usize> {
        let n_callers = self.callers.len();
        let (idx, set_at) = seen.callers.entry(name).or_insert((n_callers, None));
        if *idx == n_callers {
            self.callers.push((name, CallerOptions::default()));
        }
        if let Some(options) = options {
            let given = &mut self.callers[*idx].1;
            if let Some(before) = *set_at {
                anyhow::ensure!(
                    *given == options,
                    "the options of {name} differ from those of line {before}; write them once, \
                     or the same"
                );
            }
            *given = options;
            *set_at = Some(number);
        }
        Ok(*idx)
    }
}

fn name(word: &str) -> anyhow::Result<&str> {
    let is_name =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    anyhow::ensure!(
        word.bytes().all(is_name) && word.len() <= NAME_LEN_MAX,
        "the first of several words is the caller's name, which has small letters, digits, dots, \
         underscores and hyphens alone, and at most {NAME_LEN_MAX} of them; a token has no spaces"
    );
    // Names are in logs and metrics, where a token must never be.
    anyhow::ensure!(
        word.len() < TOKEN_LEN_MIN
            || word.contains(['.', '_', '-']) && word.contains(|sign: char| sign > 'f'),
        "the first word looks like a token, and the name comes first: NAME TOKEN; a name of \
         {TOKEN_LEN_MIN} characters or more has a dot, underscore or hyphen in it, and a letter \
         after f"
    );
    Ok(word)
}

fn proof(word: &str) -> anyhow::Result<Proof<'_>> {
    if let Some(subject) = word.strip_prefix("cert=") {
        anyhow::ensure!(
            !subject.is_empty() && subject.len() <= SUBJECT_LEN_MAX,
            "the subject of cert= has {} bytes; it must have 1 to {SUBJECT_LEN_MAX}",
            subject.len()
        );
        return Ok(Proof::Certificate(subject));
    }
    let is_option = OPTIONS.iter().any(|option| word.starts_with(option));
    anyhow::ensure!(
        !is_option,
        "an option stands where the token belongs; a line is NAME TOKEN and then its options"
    );
    anyhow::ensure!(
        word.bytes().all(|byte| byte.is_ascii_graphic()),
        "a token must have only ASCII characters and no spaces"
    );
    anyhow::ensure!(
        word.len() >= TOKEN_LEN_MIN,
        "the token has {} characters; make it {TOKEN_LEN_MIN} or more (openssl rand -hex 32)",
        word.len()
    );
    Ok(Proof::Token(word))
}

/// Parses the options at the end of a line; none if there are none.
fn options<'a>(words: impl Iterator<Item = &'a str>) -> anyhow::Result<Option<CallerOptions>> {
    let mut options = None;
    for word in words {
        let options = options.get_or_insert_with(CallerOptions::default);
        // A word that is no option may be a token in the wrong place.
        let (option, value) = word.split_once('=').context(
            "a word after the token is no option; options are rate=, in-flight=, class=",
        )?;
        let is_new = match option {
            "rate" => options.rate.replace(rate(value)?).is_none(),
            "in-flight" => options.in_flight.replace(in_flight(value)?).is_none(),
            "class" => options.class.replace(class(value)?).is_none(),
            _ => anyhow::bail!("an option is unknown; options are rate=, in-flight= and class="),
        };
        anyhow::ensure!(is_new, "an option stands twice; write it once");
    }
    Ok(options)
}

fn number(text: &str) -> Option<NonZeroU32> {
    let is_decimal = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse::<NonZeroU32>().ok()?;
    (is_decimal && number.get() <= NUMBER_MAX).then_some(number)
}

fn rate(value: &str) -> anyhow::Result<ImageRate> {
    let parsed = value.split_once('/').and_then(|(images, unit)| {
        let per = RatePeriod::ALL.into_iter().find(|per| per.unit() == unit)?;
        Some(ImageRate {
            images: number(images)?,
            per,
        })
    });
    parsed.with_context(|| {
        format!(
            "rate= must be images per second, minute or hour (100/s, 100/m or 100/h), with 1 to \
             {NUMBER_MAX} images"
        )
    })
}

fn in_flight(value: &str) -> anyhow::Result<NonZeroU32> {
    number(value).with_context(|| format!("in-flight= must be 1 to {NUMBER_MAX} images"))
}

fn class(value: &str) -> anyhow::Result<Priority> {
    Priority::ALL
        .into_iter()
        .find(|class| class.label() == value)
        .context("class= must be interactive or bulk")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn check(content: &[u8], expected: Result<usize, &str>) {
        match (TokensFile::parse(content, true), expected) {
            (Ok(file), Ok(n)) => assert_eq!(file.tokens.len(), n),
            (Err(error), Err(words)) => {
                let text = format!("{error:#}");
                assert!(text.contains(words), "{text}");
                assert!(!text.contains("secret"), "{text}");
            }
            (got, _) => panic!("{content:?}: {got:?}"),
        }
    }

    #[test]
    fn files_of_bare_tokens() {
        check(TOKEN.as_bytes(), Ok(1));
        let several = format!("# ours\n{TOKEN}\r\n\n  {TOKEN}x\n#{TOKEN}");
        check(several.as_bytes(), Ok(2));
        // Some editors begin a file so.
        let marked = format!("\u{feff}{TOKEN}\n{TOKEN}x");
        let file = TokensFile::parse(marked.as_bytes(), true).expect("a file");
        assert_eq!(file.tokens[0].0, TOKEN);
        check(format!("\u{feff}billing {TOKEN}").as_bytes(), Ok(1));
        check(b"", Err("the file has no token"));
        check(b"# secret only", Err("the file has no token"));
        check(
            b"\nsecret",
            Err("line 2: the token has 6 characters; make it 16"),
        );
        check("sécret-sécret-sécret".as_bytes(), Err("only ASCII"));
        check(b"\xff", Err("not UTF-8 text"));
        let many = |n| {
            let lines: Vec<String> = (0..n).map(|idx| format!("{TOKEN}-{idx}")).collect();
            lines.join("\n")
        };
        check(many(LINES_MAX).as_bytes(), Ok(LINES_MAX));
        check(many(LINES_MAX + 1).as_bytes(), Err("more than 256 tokens"));
        let twice = format!("{TOKEN}\n\n{TOKEN}");
        check(twice.as_bytes(), Ok(1));
        let of_two = format!("a {TOKEN}secret\n{TOKEN}secret");
        check(
            of_two.as_bytes(),
            Err("line 2: the token is that of another caller in line 1"),
        );
    }

    #[test]
    fn callers_have_names_and_options() {
        let text = format!(
            "billing {TOKEN}-1 rate=100/m  class=bulk\nbilling {TOKEN}-2\n\
             web\t{TOKEN}-3 in-flight=64\n{TOKEN}-4\n\
             mesh cert=spiffe://example.org/mesh class=interactive\nbilling cert=billing.example\n\
             billing {TOKEN}-5 class=bulk rate=100/m"
        );
        let file = TokensFile::parse(text.as_bytes(), true).expect("a file");
        let [(_, billing), (_, web), (_, mesh)] = file.callers[..] else {
            panic!("{file:?}");
        };
        let names: Vec<&str> = file.callers.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["billing", "web", "mesh"]);
        assert_eq!(
            billing.rate.map(|rate| rate.to_string()).as_deref(),
            Some("100/m")
        );
        assert_eq!(billing.class, Some(Priority::Bulk));
        assert_eq!(web.in_flight.map(NonZeroU32::get), Some(64));
        assert_eq!(mesh.class, Some(Priority::Interactive));
        let of_tokens: Vec<_> = file.tokens.iter().map(|(_, caller)| *caller).collect();
        assert_eq!(of_tokens, [Some(0), Some(0), Some(1), None, Some(0)]);
        assert_eq!(file.subjects["spiffe://example.org/mesh"], 2);
        assert_eq!(file.subjects["billing.example"], 0);
    }

    #[test]
    fn what_is_wrong_is_said_with_the_line_and_without_the_token() {
        let line = |line: &str, expected| {
            let text = format!("# a line before\n{line}");
            check(text.as_bytes(), Err(expected));
        };
        // A token in parts, or before its name.
        line("secret secret secret", "line 2: the token has 6 characters");
        line(
            "secret-secret/secret+ billing",
            "line 2: the first of several words is the caller's name",
        );
        line(
            "secretsecretsecret a-name-of-17-signs",
            "line 2: the first word looks like a token",
        );
        line(
            "3b1f6c0e-9d5a-4872-b6e0-c1d7f2a98465 a-name-of-17-signs",
            "line 2: the first word looks like a token",
        );
        line(
            "Qb3-x_72kJdd9-secret_Zk1LmNo in-flight=1000000",
            "line 2: the first of several words is the caller's name",
        );
        line(
            "search class=interactive",
            "an option stands where the token",
        );
        line("class=interactive", "an option stands where the token");
        line("a secret-secret-secret secret", "is no option");
        line("a secret-secret-secret secret=1", "an option is unknown");
        for rate in ["1", "0/s", "1/d", "1.5/s", "+1/s", "1000001/s", "/s", ""] {
            line(&format!("a {TOKEN} rate={rate}"), "line 2: rate= must be");
        }
        line(&format!("a {TOKEN} in-flight=0"), "in-flight= must be 1 to");
        line(&format!("a {TOKEN} class=urgent"), "class= must be");
        line(&format!("a {TOKEN} class=bulk class=bulk"), "stands twice");
        line(&format!("{} {TOKEN}", "a".repeat(65)), "at most 64");
        line("cert=billing", "needs a name before it");
        line("a cert=", "it must have 1 to 512");
        line("a cert=b\na cert=b", "line 3: the subject of cert= is in");
        line(
            &format!("a {TOKEN}-1 class=bulk\na {TOKEN}-2 class=interactive"),
            "line 3: the options of a differ from those of line 2",
        );
        let error = TokensFile::parse(b"a cert=b", false).expect_err("no authority");
        let text = format!("{error:#}");
        assert!(
            text.starts_with("line 1: cert= needs --tls-client-ca"),
            "{text}"
        );
    }
}
