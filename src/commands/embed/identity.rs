//! Identity of locations: which spellings name the same data, and which
//! locations lie inside others.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use super::location::Location;

/// Returns the path without symbolic links and `..`. The end of the path need
/// not exist.
fn resolved(path: &Path) -> PathBuf {
    let mut missing: Vec<OsString> = Vec::new();
    let mut parts = path.components();
    loop {
        let there = parts.as_path();
        if let Ok(there) = std::fs::canonicalize(there) {
            return with_missing(there, missing);
        }
        match parts.next_back() {
            Some(Component::ParentDir) => missing.push("..".into()),
            Some(Component::Normal(name)) => missing.push(name.to_owned()),
            Some(Component::CurDir) => {}
            Some(Component::RootDir | Component::Prefix(_)) | None => {
                return with_missing(there.to_owned(), missing);
            }
        }
    }
}

/// Adds parts that do not exist, of which the last comes first, to a path.
fn with_missing(mut path: PathBuf, missing: Vec<OsString>) -> PathBuf {
    for part in missing.into_iter().rev() {
        if part == ".." {
            path.pop();
        } else {
            path.push(part);
        }
    }
    path
}

/// Returns a text that is the same for all spellings of a location: with and
/// without a slash at the end, `.` and `..`, and through links to directories
/// above it. A link itself is another location than its target.
pub(super) fn identity(location: &Location) -> String {
    match location {
        Location::Local(path) => {
            let mut parts = path.components();
            let path = match parts.next_back() {
                Some(Component::Normal(name)) => resolved(parts.as_path()).join(name),
                _ => resolved(path),
            };
            path.display().to_string()
        }
        Location::Remote { path, url, .. } => {
            let start = url.find("://").map_or(0, |at| at + "://".len());
            let (root, rest) = match url[start..].find('/') {
                Some(slash) => url.split_at(start + slash),
                None => (url.as_str(), ""),
            };
            let is_web = url.starts_with("http");
            let query = rest.find('?').filter(|_| is_web).map(|at| &rest[at..]);
            format!(
                "{}/{path}{}",
                root.to_ascii_lowercase(),
                query.unwrap_or_default()
            )
        }
    }
}

/// True if the output is the directory, or lies below it, however the two are
/// spelled.
pub(super) fn is_inside(output: &str, folder: &Location) -> bool {
    match folder {
        // A path of an output is absolute.
        Location::Local(folder) if Path::new(output).is_absolute() => {
            resolved(Path::new(output)).starts_with(resolved(folder))
        }
        Location::Local(_) => false,
        Location::Remote { url, .. } => {
            format!("{output}/").starts_with(&format!("{}/", url.trim_end_matches('/')))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::location::Stores;
    use super::*;

    #[test]
    fn a_location_is_the_same_however_it_is_spelled() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        let root = dir.path().display();
        let of = |text: &str| identity(&Stores::default().locate(text).unwrap());
        let local = |path: &str| of(&format!("{root}/{path}"));
        for same in [
            "a/b/",
            "a//b",
            "./a/./b/.",
            "a/../a/b",
            "link/b",
            "a/b/../b",
        ] {
            assert_eq!(local(same), local("a/b"), "{same}");
        }
        assert_eq!(of(&format!("file://{root}/a/b/")), local("a/b"));
        assert_eq!(local("a/b/.."), local("a"));
        assert_ne!(local("link"), local("a"));
        assert_eq!(local("gone/x/../y"), local("gone/y"));
        for (one, other) in [
            ("http://127.0.0.1:1/p", "HTTP://127.0.0.1:1/p/"),
            ("http://Example.org/a b.tar", "http://example.org/a%20b.tar"),
            ("http://x/a.tar?v=1", "http://x/a.tar?v=1&sig=2"),
        ] {
            assert_eq!(of(one), of(other));
        }
        for (one, other) in [
            ("http://x/a.tar?v=1", "http://x/a.tar?v=2"),
            ("http://x/a.tar", "http://x/A.tar"),
            ("http://x/a.tar", "https://x/a.tar"),
        ] {
            assert_ne!(of(one), of(other));
        }
    }

    #[test]
    fn an_output_lies_where_links_lead() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("in/sub")).unwrap();
        std::fs::create_dir_all(dir.path().join("other")).unwrap();
        for (link, target) in [
            ("to-in", "in"),
            ("to-sub", "in/sub"),
            ("in/out", "../other"),
        ] {
            std::os::unix::fs::symlink(target, dir.path().join(link)).unwrap();
        }
        let at = |name: &str| dir.path().join(name).display().to_string();
        let check = |output: &str, folder: &str| {
            is_inside(&at(output), &Location::Local(at(folder).into()))
        };
        for output in [
            "in",
            "in/",
            "in/new/o",
            "to-in/new",
            "to-sub",
            "other/../in/new",
            "other/new/../../in/o",
        ] {
            for folder in ["in", "in/", "to-in", "other/../in"] {
                assert!(check(output, folder), "{output} {folder}");
            }
        }
        for output in ["other", "in-o", "to-in/../o", "in/out/o", "in/../o", "o"] {
            assert!(!check(output, "in"), "{output}");
        }
    }
}
