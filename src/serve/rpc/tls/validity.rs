//! Time in which a certificate is valid. rustls leaves a server's own
//! certificate to its clients, which refuse one that has ended or not begun.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

/// Difference between the clocks of an authority and of this machine that makes
/// no new certificate invalid: clients have clocks of their own.
const CLOCK_SKEW_MAX: Duration = Duration::from_mins(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CertificateValidity {
    begin: SystemTime,
    pub(super) end: SystemTime,
}

/// Reason for which a certificate is of no use now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::serve::rpc) enum NotValid {
    #[error(
        "the certificate ended at {}, and clients refuse it; put its successor there",
        humantime::format_rfc3339_seconds(*.0)
    )]
    Ended(SystemTime),
    #[error(
        "the certificate begins at {}, and clients refuse it until then; put a certificate there \
         that is valid now, or set this machine's clock, by which it is {}",
        humantime::format_rfc3339_seconds(*.begin),
        humantime::format_rfc3339_seconds(*.now)
    )]
    NotBegun { begin: SystemTime, now: SystemTime },
}

impl CertificateValidity {
    /// Reads the validity of a certificate; `None` if the certificate cannot be
    /// read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let validity = certificate.validity();
        Some(Self {
            begin: time(validity.not_before)?,
            end: time(validity.not_after)?,
        })
    }

    /// Checks that the certificate is valid at the time `now`.
    pub(super) fn check(self, now: SystemTime) -> Result<(), NotValid> {
        if self.end <= now {
            return Err(NotValid::Ended(self.end));
        }
        if self.begin > now + CLOCK_SKEW_MAX {
            return Err(NotValid::NotBegun {
                begin: self.begin,
                now,
            });
        }
        Ok(())
    }
}

/// Converts a time; one before 1970 is taken for the beginning of 1970.
fn time(time: ASN1Time) -> Option<SystemTime> {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(begin: (i32, u8, u8), end: (i32, u8, u8)) -> CertificateDer<'static> {
        let names = vec!["localhost".to_owned()];
        let mut params = rcgen::CertificateParams::new(names).expect("names");
        params.not_before = rcgen::date_time_ymd(begin.0, begin.1, begin.2);
        params.not_after = rcgen::date_time_ymd(end.0, end.1, end.2);
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        certificate.der().clone()
    }

    /// Returns the time of a day, by its number of days since 1970.
    fn day(days: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(days * 86_400)
    }

    #[test]
    fn a_certificate_is_valid_from_its_begin_to_its_end() {
        let made = certificate((2030, 1, 2), (2031, 5, 6));
        let validity = CertificateValidity::of(&made).expect("a validity");
        // The numbers of days were computed with `date -u -d ... +%s`.
        let (begin, end) = (day(21_916), day(22_405));
        assert_eq!(validity, CertificateValidity { begin, end });
        let second = Duration::from_secs(1);
        let early = begin - CLOCK_SKEW_MAX - second;
        let not_begun = NotValid::NotBegun { begin, now: early };
        assert_eq!(validity.check(early), Err(not_begun));
        assert_eq!(validity.check(begin - CLOCK_SKEW_MAX), Ok(()));
        assert_eq!(validity.check(begin), Ok(()));
        assert_eq!(validity.check(end - second), Ok(()));
        assert_eq!(validity.check(end), Err(NotValid::Ended(end)));
        let text = NotValid::Ended(end).to_string();
        assert!(text.contains("ended at 2031-05-06T00:00:00Z"), "{text}");
        let text = not_begun.to_string();
        assert!(text.contains("begins at 2030-01-02T00:00:00Z"), "{text}");
    }

    #[test]
    fn years_before_1970_and_after_2049_are_read() {
        let made = certificate((1960, 1, 1), (2100, 3, 1));
        let validity = CertificateValidity::of(&made).expect("a validity");
        assert_eq!(validity.begin, UNIX_EPOCH);
        assert_eq!(validity.end, day(47_541));
    }

    #[test]
    fn garbage_has_no_validity() {
        let made = certificate((2030, 1, 2), (2031, 5, 6));
        for len in 0..made.len() {
            // Nothing must panic.
            let part = CertificateDer::from(made[..len].to_vec());
            assert_eq!(CertificateValidity::of(&part), None, "{len}");
        }
        let text = CertificateDer::from(b"nonsense".to_vec());
        assert_eq!(CertificateValidity::of(&text), None);
    }
}
