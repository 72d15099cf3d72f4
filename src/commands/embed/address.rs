//! Rules for the addresses that a list's URLs may lead to. A host name proves
//! nothing: the address that a connection is opened to decides, so the resolver
//! of host names applies the same rules.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Reach of an address: from where the address can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddressScope {
    /// Reachable from anywhere on the internet.
    Public,
    /// Reachable only from this machine or its own network: loopback, private,
    /// shared, multicast, reserved.
    Private,
    /// Reachable only on the machine's own link, where clouds serve metadata
    /// and credentials.
    LinkLocal,
}

impl std::fmt::Display for AddressScope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::Private => "private",
            Self::LinkLocal => "link-local",
        })
    }
}

/// Metadata services that are not at a link-local address: AWS over IPv6,
/// Alibaba Cloud, Oracle Cloud.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254);
const METADATA_V4: [Ipv4Addr; 2] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
];

/// Returns the reach of an address by IANA's registries of special addresses.
/// An IPv6 address that stands for an IPv4 address reaches no further than the
/// IPv4 address.
pub(super) fn scope(address: IpAddr) -> AddressScope {
    match address {
        IpAddr::V4(address) => scope_v4(address),
        IpAddr::V6(address) => scope_v6(address),
    }
}

fn scope_v4(address: Ipv4Addr) -> AddressScope {
    let [a, b, c, _] = address.octets();
    if address.is_link_local() || METADATA_V4.contains(&address) {
        return AddressScope::LinkLocal;
    }
    let is_special = matches!(
        (a, b, c),
        // This network, private use, shared space of carriers, loopback.
        (0 | 10 | 127 | 224.., ..)
            | (100, 64..=127, _)
            | (172, 16..=31, _)
            | (192, 168, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (198, 18 | 19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    );
    if is_special {
        AddressScope::Private
    } else {
        AddressScope::Public
    }
}

fn scope_v6(address: Ipv6Addr) -> AddressScope {
    let [a, b, c, ..] = address.segments();
    if (a & 0xffc0) == 0xfe80 || address == METADATA_V6 {
        return AddressScope::LinkLocal;
    }
    let octets = address.octets();
    let v4 = |at: usize| Ipv4Addr::new(octets[at], octets[at + 1], octets[at + 2], octets[at + 3]);
    // A gateway of this machine's network may lead to any address in that
    // network.
    let private_at_most = |inner: AddressScope| match inner {
        AddressScope::LinkLocal => AddressScope::LinkLocal,
        AddressScope::Public | AddressScope::Private => AddressScope::Private,
    };
    match (a, b, c) {
        // Mapped, compatible and translated; NAT64.
        _ if octets[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff] => scope_v4(v4(12)),
        _ if octets[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0] => scope_v4(v4(12)),
        _ if octets[..12] == [0; 12] => private_at_most(scope_v4(v4(12))),
        (0x64, 0xff9b, 0) if octets[4..12] == [0; 8] => scope_v4(v4(12)),
        (0x64, 0xff9b, 1) => private_at_most(scope_v4(v4(12))),
        // 6to4 has the IPv4 address after the prefix, Teredo inverted at the
        // end.
        (0x2002, ..) => scope_v4(v4(2)),
        (0x2001, 0, _) => private_at_most(scope_v4(Ipv4Addr::from_bits(!v4(12).to_bits()))),
        // Addresses of the IETF's protocols, and of documentation.
        (0x2001, 0x1..=0x1ff | 0xdb8, _) | (0x3fff, 0..=0x0fff, _) => AddressScope::Private,
        // Global unicast. Every other address is loopback, unique local,
        // multicast or not assigned.
        (0x2000..=0x3fff, ..) => AddressScope::Public,
        _ => AddressScope::Private,
    }
}

/// Rule for the addresses that a request may be sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddressRule {
    /// Address that a list names itself, or that is the target of a redirect
    /// from a host that only this machine's network reaches.
    Named {
        /// True if `--link-local-addresses` allows link-local addresses, too.
        link_local: bool,
    },
    /// Address that is the target of a redirect from a public address; with
    /// `--public-addresses-only` every address.
    Public,
}

impl AddressRule {
    pub(super) fn allows(self, scope: AddressScope) -> bool {
        match (self, scope) {
            (_, AddressScope::Public) | (Self::Named { .. }, AddressScope::Private) => true,
            (Self::Named { link_local }, AddressScope::LinkLocal) => link_local,
            (Self::Public, AddressScope::Private | AddressScope::LinkLocal) => false,
        }
    }
}

/// Error of an address that the rule does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{address} is a {scope} address")]
pub(super) struct AddressRefused {
    pub(super) address: IpAddr,
    pub(super) scope: AddressScope,
}

/// Lookup of host names, and of the reach of addresses. Tests replace both with
/// a network of their own.
#[derive(Clone)]
pub(super) struct AddressBook {
    pub(super) names: Arc<dyn Resolve>,
    pub(super) scope: fn(IpAddr) -> AddressScope,
}

impl std::fmt::Debug for AddressBook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressBook").finish_non_exhaustive()
    }
}

impl Default for AddressBook {
    fn default() -> Self {
        Self {
            names: Arc::new(SystemNames),
            scope,
        }
    }
}

impl AddressBook {
    /// Checks that the rule allows an address.
    pub(super) fn check(&self, rule: AddressRule, address: IpAddr) -> Result<(), AddressRefused> {
        let scope = (self.scope)(address);
        if rule.allows(scope) {
            Ok(())
        } else {
            Err(AddressRefused { address, scope })
        }
    }

    /// Checks that the rule allows the host of a URL if the host is an address,
    /// since a connection to an address resolves no name. Unusual spellings
    /// (2130706433, 0x7f.1) have become the usual one in a parsed URL.
    pub(super) fn check_literal(&self, rule: AddressRule, url: &Url) -> Result<(), AddressRefused> {
        let host = url.host_str().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host.parse()
            .map_or(Ok(()), |address| self.check(rule, address))
    }
}

/// Resolver of the system.
#[derive(Debug)]
struct SystemNames;

impl Resolve for SystemNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Resolver that returns only addresses that its rule allows. So a connection
/// is opened to an allowed address or to none, however often a name changes.
#[derive(Debug)]
pub(super) struct RuledNames {
    pub(super) book: AddressBook,
    pub(super) rule: AddressRule,
}

impl Resolve for RuledNames {
    fn resolve(&self, name: Name) -> Resolving {
        let found = self.book.names.resolve(name);
        let (book, rule) = (self.book.clone(), self.rule);
        Box::pin(async move {
            let mut allowed: Vec<SocketAddr> = Vec::new();
            let mut refused = None;
            for socket in found.await? {
                match book.check(rule, socket.ip()) {
                    Ok(()) => allowed.push(socket),
                    Err(error) => refused = Some(error),
                }
            }
            match refused {
                Some(refused) if allowed.is_empty() => Err(refused.into()),
                None if allowed.is_empty() => Err(io::Error::from(io::ErrorKind::NotFound).into()),
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_registry_of_special_addresses_has_its_scope() {
        use AddressScope::{LinkLocal, Private, Public};
        let table = [
            (
                Public,
                "8.8.8.8 1.1.1.1 100.63.255.255 100.128.0.0 172.15.0.1 172.32.0.1",
            ),
            (
                Public,
                "192.0.1.1 198.17.0.1 198.20.0.1 223.255.255.255 169.253.1.1",
            ),
            (
                Public,
                "2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::808:808",
            ),
            (Public, "2002:808:808::1 2400:cb00::1 3ffe::1"),
            (
                Private,
                "127.0.0.1 127.255.255.255 10.0.0.1 172.16.0.1 172.31.255.255",
            ),
            (
                Private,
                "192.168.0.1 100.64.0.1 100.127.255.255 0.0.0.0 0.1.2.3",
            ),
            (
                Private,
                "224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255",
            ),
            (
                Private,
                "192.0.0.1 192.0.2.1 192.88.99.1 198.18.0.1 198.19.255.255",
            ),
            (
                Private,
                "198.51.100.1 203.0.113.1 :: ::1 fc00::1 fdff::1 fec0::1 ff02::1",
            ),
            (
                Private,
                "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::8.8.8.8 ::ffff:0:192.168.0.1",
            ),
            (
                Private,
                "64:ff9b::a00:1 64:ff9b:1::808:808 2002:a00:1::1 2002:7f00:1::",
            ),
            (
                Private,
                "2001:db8::1 2001:2::1 2001:20::1 3fff::1 2001:0:1::f7f7:f7f7 5f00::1",
            ),
            (
                LinkLocal,
                "169.254.169.254 169.254.0.1 100.100.100.200 192.0.0.192",
            ),
            (
                LinkLocal,
                "fe80::1 febf::1 fd00:ec2::254 ::ffff:169.254.169.254",
            ),
            (
                LinkLocal,
                "64:ff9b::a9fe:a9fe 2002:a9fe:a9fe::1 ::169.254.169.254",
            ),
            (LinkLocal, "64:ff9b:1::a9fe:a9fe 2001:0:1::5601:5601"),
        ];
        for (expected, addresses) in table {
            for address in addresses.split(' ') {
                let address: IpAddr = address.parse().unwrap();
                assert_eq!(scope(address), expected, "{address}");
            }
        }
    }

    #[test]
    fn an_address_in_a_url_is_the_same_however_it_is_spelled() {
        let book = AddressBook::default();
        let refused = |url: &str| {
            let url = url.parse().unwrap();
            book.check_literal(AddressRule::Public, &url).err()
        };
        for loopback in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.1:80/",
            "https://user@127.0.0.1/",
        ] {
            let refused = refused(loopback).unwrap();
            assert_eq!(refused.to_string(), "127.0.0.1 is a private address");
        }
        assert!(refused("http://[::1]/").is_some());
        assert!(refused("http://[::ffff:a9fe:a9fe]/").is_some());
        assert_eq!(refused("http://8.8.8.8/"), None);
        // The resolver of the name checks its addresses.
        assert_eq!(refused("http://localhost/"), None);
    }

    #[test]
    fn a_rule_allows_what_its_list_may_name() {
        use AddressScope::{LinkLocal, Private, Public};
        let allowed = |rule: AddressRule| {
            let scopes = [Public, Private, LinkLocal].into_iter();
            scopes
                .filter(|&scope| rule.allows(scope))
                .collect::<Vec<_>>()
        };
        let named = |link_local| AddressRule::Named { link_local };
        assert_eq!(allowed(AddressRule::Public), [Public]);
        assert_eq!(allowed(named(false)), [Public, Private]);
        assert_eq!(allowed(named(true)), [Public, Private, LinkLocal]);
    }
}
