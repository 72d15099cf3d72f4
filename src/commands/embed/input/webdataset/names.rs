//! Names of a shard's samples: keys, ids that are never given twice, and links
//! between files of the shard.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::super::Broken;
use super::super::archive::{Extent, StoredContent};

/// Longest name, in bytes: what Linux allows of a path. Ids are held in memory
/// until their part is written.
const NAME_BYTES_MAX: usize = 4096;
/// Most ids of a shard: about 100 MB of memory. A shard usually has 10,000.
const IDS_MAX: usize = 1 << 22;
/// Memory for the places of the files that a later link may name: the last
/// 50,000 files or more.
const LINKED_BYTES_MAX: usize = 8 << 20;

/// Name of a member as text, without a leading `./`.
#[derive(Debug)]
pub(super) struct MemberName {
    pub(super) text: String,
    /// Reason for which the file is refused because of its name.
    pub(super) fault: Option<String>,
}

impl MemberName {
    pub(super) fn new(mut name: &[u8]) -> Self {
        while let Some(rest) = name.strip_prefix(b"./") {
            name = rest;
        }
        if name.len() <= NAME_BYTES_MAX {
            return Self {
                text: crate::files::name_as_text(name).into_owned(),
                fault: None,
            };
        }
        // The end tells the kind of file.
        let end = &name[name.len() - NAME_BYTES_MAX / 2..];
        let text = [&name[..NAME_BYTES_MAX / 2], b"...", end].concat();
        Self {
            text: crate::files::name_as_text(&text).into_owned(),
            fault: Some(format!(
                "its name has {} bytes, over the limit of {NAME_BYTES_MAX}",
                name.len()
            )),
        }
    }
}

/// Splits a file name: `a/b/000.seg.PNG` has the key `a/b/000` and the
/// extension `seg.png`.
pub(super) fn split(name: &str) -> Option<(&str, String)> {
    let file = name.rfind('/').map_or(0, |slash| slash + 1);
    // A dotfile has no key.
    let dot = file + name[file..].find('.').filter(|&at| at > 0)?;
    Some((&name[..dot], name[dot + 1..].to_ascii_lowercase()))
}

/// Ids that a shard has given out. Two images never have the same id: a sample's
/// first image has the key, every further image its whole name, and a name that
/// is there again a number after it.
#[derive(Debug, Default)]
pub(super) struct SampleIds {
    /// Hashes of the ids. Two ids with the same hash, once in billions of
    /// shards, only make the second a longer one.
    taken: HashSet<u64>,
    /// Last number of the names that are there several times.
    numbers: HashMap<u64, u64>,
}

impl SampleIds {
    /// Gives the id of a member: the key if it is wanted and free.
    pub(super) fn give(&mut self, key: Option<&str>, name: &str) -> Result<String, Broken> {
        if self.taken.len() >= IDS_MAX {
            return Err(Broken::OverLimit(format!(
                "the tar has over {IDS_MAX} images, the limit; split it"
            )));
        }
        for id in key.into_iter().chain([name]) {
            if self.taken.insert(hash(id)) {
                return Ok(id.to_owned());
            }
        }
        let number = self.numbers.entry(hash(name)).or_insert(1);
        loop {
            *number += 1;
            let id = format!("{name}#{number}");
            if self.taken.insert(hash(&id)) {
                return Ok(id);
            }
        }
    }
}

fn hash(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

/// Places of the latest files of a tar, by their names, for links to them.
#[derive(Debug, Default)]
pub(super) struct LinkTargets {
    places: HashMap<Vec<u8>, StoredContent>,
    /// Names in the order of the tar, each with the memory that it takes.
    order: VecDeque<(Vec<u8>, usize)>,
    bytes: usize,
}

impl LinkTargets {
    /// Remembers a file. The oldest ones are forgotten where memory ends.
    pub(super) fn insert(&mut self, name: &[u8], content: &StoredContent) {
        /// Memory of an entry in both collections, besides its name and map.
        const ENTRY_BYTES: usize = 128;
        let name = plain(name);
        if name.len() > NAME_BYTES_MAX {
            return;
        }
        let map = content.map.as_ref().map_or(0, Vec::len);
        let bytes = 2 * name.len() + map * size_of::<Extent>() + ENTRY_BYTES;
        self.places.insert(name.clone(), content.clone());
        self.order.push_back((name, bytes));
        self.bytes += bytes;
        while self.bytes > LINKED_BYTES_MAX
            && let Some((oldest, bytes)) = self.order.pop_front()
        {
            self.bytes -= bytes;
            // A later file of the same name is forgotten with the first.
            self.places.remove(&oldest);
        }
    }

    pub(super) fn hard(&self, target: &[u8]) -> Option<&StoredContent> {
        self.places.get(&plain(target))
    }

    /// Finds the target of a symbolic link, which is relative to the link's own
    /// directory.
    pub(super) fn symbolic(&self, link: &[u8], target: &[u8]) -> Option<&StoredContent> {
        if target.starts_with(b"/") {
            return None;
        }
        let directory = link.iter().rposition(|&byte| byte == b'/');
        let directory = directory.map_or(&b""[..], |slash| &link[..=slash]);
        self.places.get(&plain(&[directory, target].concat()))
    }
}

/// Returns a path without `.`, `..` and doubled slashes.
fn plain(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| *last != b"..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// Shows a link's target in an error.
pub(super) fn shown(target: &[u8]) -> Cow<'_, str> {
    const SHOWN_MAX: usize = 200;
    crate::files::name_as_text(&target[..target.len().min(SHOWN_MAX)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_end_at_the_first_dot_of_the_file() {
        assert_eq!(
            split("a.b/00.seg.PNG"),
            Some(("a.b/00", "seg.png".to_owned()))
        );
        assert_eq!(split("00"), None);
        assert_eq!(split("a/.hidden"), None);
    }

    #[test]
    fn no_id_is_given_twice() {
        let mut ids = SampleIds::default();
        let mut given = |key, name| ids.give(key, name).unwrap();
        assert_eq!(given(Some("a"), "a.jpg"), "a");
        assert_eq!(given(Some("a"), "a.png"), "a.png");
        assert_eq!(given(Some("a"), "a.png"), "a.png#2");
        assert_eq!(given(Some("a"), "a.jpg"), "a.jpg");
        assert_eq!(given(None, "a.png"), "a.png#3");
    }

    #[test]
    fn a_link_leads_to_a_file_before_it() {
        let mut targets = LinkTargets::default();
        let content = |at| StoredContent {
            at,
            size: 1,
            map: None,
        };
        targets.insert(b"./a/b/1.jpg", &content(1));
        targets.insert(b"2.jpg", &content(2));
        let at = |found: Option<&StoredContent>| found.map(|content| content.at);
        assert_eq!(at(targets.hard(b"a//b/1.jpg")), Some(1));
        assert_eq!(at(targets.symbolic(b"a/c/x.jpg", b"../b/1.jpg")), Some(1));
        assert_eq!(at(targets.symbolic(b"a/x.jpg", b"../2.jpg")), Some(2));
        assert_eq!(at(targets.symbolic(b"a/x.jpg", b"2.jpg")), None);
        assert_eq!(at(targets.symbolic(b"x.jpg", b"/2.jpg")), None);
        assert_eq!(at(targets.symbolic(b"x.jpg", b"../2.jpg")), None);
        for n in 0..200_000 {
            targets.insert(format!("{n}.jpg").as_bytes(), &content(n));
        }
        assert!(targets.bytes <= LINKED_BYTES_MAX && targets.places.len() > 50_000);
        assert_eq!(at(targets.hard(b"2.jpg")), None, "forgotten");
        assert_eq!(at(targets.hard(b"199999.jpg")), Some(199_999));
    }

    #[test]
    fn a_long_name_is_cut_and_refused() {
        let name = MemberName::new(&[b"x".repeat(5000), b".jpg".to_vec()].concat());
        assert_eq!(name.text.len(), NAME_BYTES_MAX + 3);
        assert!(name.text.ends_with("x.jpg") && name.fault.is_some());
        assert_eq!(MemberName::new(b"././a.jpg").text, "a.jpg");
    }
}
