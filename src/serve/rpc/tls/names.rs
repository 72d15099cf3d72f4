//! Names of a client in its verified certificate (mutual TLS).

use std::sync::Arc;

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Largest number of names that are read from a certificate: a connection keeps
/// them while it is open. Certificates of services have a few.
const NAMES_MAX: usize = 64;
/// Largest length of a name that is read, which is also that of a subject in
/// the tokens file: enough for any host name or SPIFFE ID in use.
pub(in crate::serve::rpc) const SUBJECT_LEN_MAX: usize = 512;

/// Names of a client, the most specific kind first: URIs, DNS names and email
/// addresses of the subject's alternative names, then its common names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::serve::rpc) struct ClientNames(Arc<[Box<str>]>);

impl ClientNames {
    /// Reads the names of a certificate; none for one that has none or cannot
    /// be read.
    pub(in crate::serve::rpc) fn of(certificate: &CertificateDer<'_>) -> Self {
        let names = X509Certificate::from_der(certificate)
            .map(|(_, certificate)| names(&certificate))
            .unwrap_or_default();
        Self(names.into())
    }

    pub(in crate::serve::rpc) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(AsRef::as_ref)
    }
}

fn names(certificate: &X509Certificate<'_>) -> Vec<Box<str>> {
    let alternative = certificate.subject_alternative_name().ok().flatten();
    let alternative = alternative.map(|names| &names.value.general_names);
    let all = || alternative.into_iter().flatten();
    let uris = all().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let hosts = all().filter_map(|name| match name {
        GeneralName::DNSName(host) => Some(*host),
        _ => None,
    });
    let emails = all().filter_map(|name| match name {
        GeneralName::RFC822Name(email) => Some(*email),
        _ => None,
    });
    let subject = certificate.subject().iter_common_name();
    let subject = subject.filter_map(|name| name.as_str().ok());
    uris.chain(hosts)
        .chain(emails)
        .chain(subject)
        .filter(|name| !name.is_empty() && name.len() <= SUBJECT_LEN_MAX)
        .take(NAMES_MAX)
        .map(Into::into)
        .collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn read(params: &CertificateParams) -> Vec<String> {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let names = ClientNames::of(certificate.der());
        names.iter().map(str::to_owned).collect()
    }

    #[test]
    fn names_are_read_in_the_order_of_their_kinds() {
        let mut params = CertificateParams::new(vec!["billing.example".to_owned()]).expect("names");
        params
            .distinguished_name
            .push(DnType::CommonName, "billing");
        for name in [
            SanType::Rfc822Name("billing@example.org".try_into().expect("ASCII")),
            SanType::URI("spiffe://example.org/billing".try_into().expect("ASCII")),
        ] {
            params.subject_alt_names.push(name);
        }
        let expected = [
            "spiffe://example.org/billing",
            "billing.example",
            "billing@example.org",
            "billing",
        ];
        assert_eq!(read(&params), expected);
    }

    #[test]
    fn names_are_bounded() {
        let hosts = (0..100).map(|idx| format!("host-{idx}.example"));
        let long = format!("{}.example", "a".repeat(SUBJECT_LEN_MAX));
        let all = std::iter::once(long).chain(hosts).collect::<Vec<_>>();
        let names = read(&CertificateParams::new(all).expect("names"));
        assert_eq!(names.len(), NAMES_MAX);
        assert_eq!(names[0], "host-0.example");
        let garbage = CertificateDer::from(b"nonsense".to_vec());
        assert_eq!(ClientNames::of(&garbage).iter().count(), 0);
    }
}
