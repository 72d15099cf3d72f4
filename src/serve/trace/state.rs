//! The `tracestate` of a caller, as W3C Trace Context has it: what other systems
//! say about a trace, which is passed on.

/// Most members of a list; a list with more is malformed.
const MEMBERS_MAX: usize = 32;
/// Longest list that is passed on, in characters: as long as the W3C asks every
/// system to pass on. It is the caller's own text, and is in one span per call.
const LEN_MAX: usize = 512;
/// Longest member that is kept where a list is too long and others could be
/// left out.
const MEMBER_LEN_MAX: usize = 128;
/// Longest key or value.
const PART_LEN_MAX: usize = 256;
/// Longest tenant and system of a key that has both.
const TENANT_LEN_MAX: usize = 241;
const SYSTEM_LEN_MAX: usize = 14;

/// Joins the values of `tracestate` headers to one list without white space.
/// Returns `None` if there is no member, or if the list is malformed, which
/// makes all of it worthless.
///
/// Members of a list that is too long are left out whole: first those of more
/// than 128 characters, and then those at the end, which are the oldest.
pub(crate) fn tracestate<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<String> {
    let mut members = Vec::new();
    for value in values {
        for member in std::str::from_utf8(value).ok()?.split(',') {
            let member = member.trim_matches([' ', '\t']);
            // The specification allows empty members, and does not count them.
            if member.is_empty() {
                continue;
            }
            let (key, value) = member.split_once('=')?;
            if members.len() == MEMBERS_MAX || !is_key(key) || !is_value(value) {
                return None;
            }
            members.push(member);
        }
    }
    let is_long = |members: &[&str]| {
        let n_commas = members.len().saturating_sub(1);
        members.iter().map(|member| member.len()).sum::<usize>() + n_commas > LEN_MAX
    };
    if is_long(&members) {
        members.retain(|member| member.len() <= MEMBER_LEN_MAX);
    }
    while is_long(&members) {
        members.pop();
    }
    (!members.is_empty()).then(|| members.join(","))
}

/// Returns true for small letters, digits and `_-*/`, behind a letter or a
/// digit; a key with a tenant has a system behind `@`.
fn is_key(key: &str) -> bool {
    let is_name = |name: &str| {
        let mut bytes = name.bytes();
        let begins = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        bytes.next().is_some_and(begins)
            && bytes.all(|byte| begins(byte) || b"_-*/".contains(&byte))
    };
    match key.split_once('@') {
        None => key.len() <= PART_LEN_MAX && is_name(key),
        Some((tenant, system)) => {
            let fits = tenant.len() <= TENANT_LEN_MAX && system.len() <= SYSTEM_LEN_MAX;
            fits && is_name(tenant) && is_name(system)
        }
    }
}

/// Returns true for printable ASCII without commas and equals signs that does
/// not end in a space.
fn is_value(value: &str) -> bool {
    let is_sign = |byte: u8| matches!(byte, b' '..=b'~') && byte != b',' && byte != b'=';
    (1..=PART_LEN_MAX).contains(&value.len()) && value.bytes().all(is_sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(values: &[&str], expected: Option<&str>) {
        let bytes = values.iter().map(|value| value.as_bytes());
        assert_eq!(tracestate(bytes).as_deref(), expected, "{values:?}");
    }

    #[test]
    fn lists_are_joined_without_white_space() {
        check(&[], None);
        check(&["", ",, "], None);
        check(&["a=1"], Some("a=1"));
        check(&[" a=1 ,\tb=2", "", "c=3,"], Some("a=1,b=2,c=3"));
        check(&["1a@b=x y !~", "a_-*/0=b"], Some("1a@b=x y !~,a_-*/0=b"));
        check(&["foo=1,foo=2"], Some("foo=1,foo=2"));
    }

    #[test]
    fn one_malformed_member_makes_all_worthless() {
        for member in [
            "b", "=", "=1", "b=", "b==1", "b=1=2", "B=1", "-b=1", "b b=1", "@b=1", "b@=1",
            "b@c@d=1", "b =1", "b=\u{e9}", "b=\u{7f}", "b=1\t2", "=;\"<>",
        ] {
            check(&["a=1", member], None);
            check(&[&format!("{member},a=1")], None);
        }
        check(&[",,,,=;\"<>"], None);
        let longest = format!("{}=1", "k".repeat(256));
        check(&[&longest], Some(&longest));
        check(&[&format!("{}=1", "k".repeat(257))], None);
        check(&[&format!("a={}", "x".repeat(257))], None);
        check(&[&format!("{}@b=1", "t".repeat(242))], None);
        check(&[&format!("a@{}=1", "s".repeat(15))], None);
        assert_eq!(tracestate([&b"a=\xff"[..]].into_iter()), None);
    }

    #[test]
    fn a_list_has_32_members_at_most() {
        let list = |n: usize| {
            let members: Vec<String> = (0..n).map(|idx| format!("v{idx}=1")).collect();
            members.join(",")
        };
        check(&[&list(32)], Some(&list(32)));
        check(&[&list(33)], None);
        check(&[&list(1000)], None);
        check(
            &[&list(31), ",,,", "a=1"],
            Some(&format!("{},a=1", list(31))),
        );
    }

    #[test]
    fn a_long_list_loses_whole_members() {
        let member =
            |name: &str, len: usize| format!("{name}={}", "x".repeat(len - name.len() - 1));
        let (a, b) = (member("a", 255), member("b", 256));
        let exact = format!("{a},{b}");
        assert_eq!(exact.len(), 512);
        check(&[&exact], Some(&exact));
        // Too long by one: the largest leave before the small ones.
        check(&[&format!("{a}x,{b}")], None);
        check(&[&format!("{exact},c=1")], Some("c=1"));
        // Without large ones, the last leave.
        let parts: Vec<String> = (0..5).map(|idx| member(&format!("v{idx}"), 128)).collect();
        check(&[&parts.join(",")], Some(&parts[..3].join(",")));
    }
}
