//! Expiry of a certificate: the one field that no other code reads, and of
//! which an operator wants to be warned.
//!
//! The parser knows just enough DER (X.690) to walk to `validity.notAfter` of
//! RFC
//! 5280. If it cannot read a certificate, the expiry is unknown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// Tag of the optional version: `[0] EXPLICIT Version`.
const VERSION: u8 = 0xa0;

pub(super) fn of(certificate: &[u8]) -> Option<SystemTime> {
    let mut certificate = certificate;
    let (_, mut certificate) = value(&mut certificate, Some(SEQUENCE))?;
    let (_, mut signed) = value(&mut certificate, Some(SEQUENCE))?;
    if signed.first() == Some(&VERSION) {
        value(&mut signed, None)?;
    }
    value(&mut signed, Some(INTEGER))?; // serial number
    value(&mut signed, Some(SEQUENCE))?; // algorithm
    value(&mut signed, Some(SEQUENCE))?; // issuer
    let (_, mut validity) = value(&mut signed, Some(SEQUENCE))?;
    value(&mut validity, None)?; // not before
    let (tag, text) = value(&mut validity, None)?;
    time(tag, text)
}

/// Takes one value off the front and returns its tag and its content.
fn value<'a>(der: &mut &'a [u8], expected: Option<u8>) -> Option<(u8, &'a [u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&short, rest) = rest.split_first()?;
    let (len, rest) = if short < 0x80 {
        (usize::from(short), rest)
    } else {
        // No certificate is so long that its length needs more than three
        // bytes.
        let n_bytes = usize::from(short & 0x7f);
        if n_bytes > 3 {
            return None;
        }
        let (len, rest) = rest.split_at_checked(n_bytes)?;
        let len = len
            .iter()
            .fold(0, |len, &byte| len << 8 | usize::from(byte));
        (len, rest)
    };
    let (content, rest) = rest.split_at_checked(len)?;
    *der = rest;
    (expected.is_none_or(|expected| expected == tag)).then_some((tag, content))
}

/// Parses `YYMMDDHHMMSSZ` with years from 1950 to 2049, or `YYYYMMDDHHMMSSZ`.
fn time(tag: u8, text: &[u8]) -> Option<SystemTime> {
    let digits = text.strip_suffix(b"Z")?;
    let number = |digits: &[u8]| -> Option<u32> { std::str::from_utf8(digits).ok()?.parse().ok() };
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => {
            let (year, rest) = digits.split_at(2);
            let year = number(year)?;
            (if year < 50 { 2000 + year } else { 1900 + year }, rest)
        }
        (GENERALIZED_TIME, 14) => {
            let (year, rest) = digits.split_at(4);
            (number(year)?, rest)
        }
        _ => return None,
    };
    let field = |idx: usize| number(&rest[2 * idx..2 * idx + 2]);
    let (month, day) = (field(0)?, field(1)?);
    let (hour, minute, second) = (field(2)?, field(3)?, field(4)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || year < 1970 {
        return None;
    }
    let days = days_since_1970(year, month, day);
    let seconds = u64::from(days) * 86_400 + u64::from(hour * 3600 + minute * 60 + second);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Returns the days from 1 January 1970 in the Gregorian calendar. Years are
/// counted from March, so that the leap day comes last.
fn days_since_1970(year: u32, month: u32, day: u32) -> u32 {
    /// Number of 1 January 1970 when days are counted from March of the year 0.
    const EPOCH: u32 = 719_468;
    let (year, month) = if month < 3 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    days - EPOCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let check = |tag, text: &str, expected: Option<u64>| {
            let got = time(tag, text.as_bytes());
            let expected = expected.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(got, expected, "{text}");
        };
        // The expected times were checked with `date -u -d ... +%s`.
        check(UTC_TIME, "700101000000Z", Some(0));
        check(UTC_TIME, "261124081530Z", Some(1_795_508_130));
        check(UTC_TIME, "240229235959Z", Some(1_709_251_199));
        check(UTC_TIME, "491231235959Z", Some(2_524_607_999));
        check(GENERALIZED_TIME, "20500101000000Z", Some(2_524_608_000));
        check(GENERALIZED_TIME, "21000301000000Z", Some(4_107_542_400));
        check(GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799));
        check(UTC_TIME, "500101000000Z", None);
        check(UTC_TIME, "261324081530Z", None);
        check(UTC_TIME, "2611240815Z", None);
        check(UTC_TIME, "26112408153xZ", None);
        check(GENERALIZED_TIME, "261124081530Z", None);
    }

    #[test]
    fn a_certificate_ends_when_it_says_and_garbage_never() {
        let names = vec!["localhost".to_owned()];
        let mut params = rcgen::CertificateParams::new(names).expect("names");
        params.not_after = rcgen::date_time_ymd(2031, 5, 6);
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let der = certificate.der().to_vec();
        let got = of(&der).expect("an end");
        assert_eq!(
            humantime::format_rfc3339_seconds(got).to_string(),
            "2031-05-06T00:00:00Z"
        );
        for len in 0..der.len() {
            // Nothing must panic; a part may still have a readable expiry.
            let _ = of(&der[..len]);
        }
        assert_eq!(of(&[0x30, 0x84, 1, 1, 1, 1]), None);
        assert_eq!(of(b"nonsense"), None);
    }
}
