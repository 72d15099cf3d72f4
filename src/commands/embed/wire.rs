//! HTTP below the clients of object stores, for answers that the clients do not
//! take: keys that no path can have, presigned URLs, and servers that refuse
//! HEAD.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{HeaderValue, Method, StatusCode, Uri};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService, ReqwestConnector,
};
use object_store::{ClientOptions, Result};

/// Characters of Unicode's private area that stand for a part of a key which is
/// empty, `.` or `..`; other keys hardly have them, and would be errors, too.
const MARKS: [(&str, char); 3] = [("", '\u{f8f0}'), (".", '\u{f8f1}'), ("..", '\u{f8f2}')];
/// Character that stands for the control character 0; others follow.
const CONTROLS: u32 = 0xf700;

/// Returns the key that a name of a listing stands for, if it is a key that
/// cannot be requested.
pub(super) fn odd_key(name: &str) -> Option<String> {
    let is_mark = |letter: char| MARKS.iter().any(|(_, mark)| *mark == letter);
    let control = |letter: char| {
        let code = u32::from(letter).checked_sub(CONTROLS)?;
        char::from_u32(code).filter(char::is_ascii_control)
    };
    if !name
        .chars()
        .any(|letter| is_mark(letter) || control(letter).is_some())
    {
        return None;
    }
    let mut key = String::with_capacity(name.len());
    for letter in name.chars() {
        match MARKS.iter().find(|(_, mark)| *mark == letter) {
            Some((part, _)) => key.push_str(part),
            None => key.push(control(letter).unwrap_or(letter)),
        }
    }
    Some(key)
}

/// Replaces the parts of a key of a listing that the client refuses, with the
/// whole page on which they stand.
fn marked(key: &str) -> String {
    let parts: Vec<&str> = key.split('/').collect();
    let last = parts.len().saturating_sub(1);
    let mut all = Vec::with_capacity(parts.len());
    for (place, part) in parts.into_iter().enumerate() {
        let mark = MARKS.iter().find(|(odd, _)| *odd == part);
        all.push(match mark {
            // A slash at the end is a directory's marker.
            Some((odd, mark)) if !(odd.is_empty() && place == last) => mark.to_string(),
            _ => without_controls(part),
        });
    }
    all.join("/")
}

fn without_controls(part: &str) -> String {
    let stands_for = |code: u32| char::from_u32(CONTROLS + code);
    let mut text = String::with_capacity(part.len());
    let mut left = part;
    while let Some(letter) = left.chars().next() {
        let entity = left.strip_prefix("&#").and_then(|rest| {
            let (number, rest) = rest.split_once(';')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(digits) => u32::from_str_radix(digits, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code)
                .filter(char::is_ascii_control)
                .map(|_| (code, rest))
        });
        if let Some((code, rest)) = entity {
            text.extend(stands_for(code));
            left = rest;
            continue;
        }
        if letter.is_ascii_control() {
            text.extend(stands_for(u32::from(letter)));
        } else {
            text.push(letter);
        }
        left = &left[letter.len_utf8()..];
    }
    text
}

/// Rewrites the keys of a listing, which is XML.
fn marked_listing(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let mut left = page;
    // S3 and Google have keys, Azure has names.
    while let Some((start, end)) = [("<Key>", "</Key>"), ("<Name>", "</Name>")]
        .into_iter()
        .filter_map(|(open, close)| Some((left.find(open)? + open.len(), close)))
        .min()
    {
        let (before, rest) = left.split_at(start);
        let Some(length) = rest.find(end) else { break };
        let (key, rest) = rest.split_at(length);
        text.push_str(before);
        text.push_str(&marked(key));
        left = rest;
    }
    text.push_str(left);
    text
}

/// Connector of a store's client.
#[derive(Debug, Clone, Default)]
pub(super) struct StoreWire {
    /// True for a web server, whose files are not listed.
    pub(super) web: bool,
    /// Query of a presigned URL, for every request.
    pub(super) query: Option<String>,
}

impl HttpConnector for StoreWire {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(WiredClient {
            inner,
            wire: self.clone(),
        }))
    }
}

#[derive(Debug)]
struct WiredClient {
    inner: HttpClient,
    wire: StoreWire,
}

impl HttpService for WiredClient {
    fn call<'life0, 'future>(
        &'life0 self,
        request: HttpRequest,
    ) -> BoxFuture<'future, std::result::Result<HttpResponse, HttpError>>
    where
        'life0: 'future,
        Self: 'future,
    {
        async move {
            if self.wire.web {
                self.ask_web(request).await
            } else {
                self.ask_bucket(request).await
            }
        }
        .boxed()
    }
}

impl WiredClient {
    async fn ask_bucket(
        &self,
        request: HttpRequest,
    ) -> std::result::Result<HttpResponse, HttpError> {
        let query = request.uri().query().unwrap_or_default();
        let lists = request.method() == Method::GET
            && query
                .split('&')
                .any(|part| part == "list-type=2" || part == "comp=list");
        let response = self.inner.execute(request).await?;
        if !lists || !response.status().is_success() {
            return Ok(response);
        }
        let (mut parts, body) = response.into_parts();
        // A page has at most a thousand keys of a KiB each, and the client
        // would read it whole, too.
        let page = body.bytes().await?;
        let page = match std::str::from_utf8(&page) {
            Ok(text) => marked_listing(text).into(),
            Err(_) => page,
        };
        parts.headers.remove(CONTENT_LENGTH);
        Ok(HttpResponse::from_parts(
            parts,
            HttpResponseBody::from(page),
        ))
    }

    async fn ask_web(
        &self,
        mut request: HttpRequest,
    ) -> std::result::Result<HttpResponse, HttpError> {
        if let Some(query) = &self.wire.query {
            *request.uri_mut() = with_query(request.uri(), query)?;
        }
        if request.method() != Method::HEAD {
            return self.inner.execute(request).await;
        }
        let again = |method: Method| {
            let mut again = HttpRequest::new(HttpRequestBody::empty());
            *again.method_mut() = method;
            *again.uri_mut() = request.uri().clone();
            *again.headers_mut() = request.headers().clone();
            again
        };
        // A signature is made for one method, which is GET.
        if self.wire.query.is_none() {
            let response = self.inner.execute(again(Method::HEAD)).await?;
            let refuses_head = matches!(response.status().as_u16(), 400 | 401 | 403 | 405 | 501);
            if !refuses_head {
                return Ok(response);
            }
        }
        let mut first = again(Method::GET);
        first
            .headers_mut()
            .insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let response = self.inner.execute(first).await?;
        Ok(as_head(response))
    }
}

/// Converts the answer for a file's first byte into the answer for HEAD.
fn as_head(response: HttpResponse) -> HttpResponse {
    // The body is dropped here: a server that knows no ranges sends it whole.
    let (mut parts, _) = response.into_parts();
    let range = parts.headers.remove(CONTENT_RANGE);
    let range = range.as_ref().and_then(|range| range.to_str().ok());
    let bytes = range.and_then(|range| range.rsplit_once('/')?.1.parse::<u64>().ok());
    match (parts.status, bytes) {
        (StatusCode::PARTIAL_CONTENT, Some(bytes)) => {
            parts.status = StatusCode::OK;
            parts.headers.insert(CONTENT_LENGTH, bytes.into());
        }
        // An empty file has no first byte.
        (StatusCode::RANGE_NOT_SATISFIABLE, Some(0)) => {
            parts.status = StatusCode::OK;
            parts.headers.insert(CONTENT_LENGTH, 0_u64.into());
        }
        _ => {}
    }
    HttpResponse::from_parts(parts, HttpResponseBody::from(Vec::new()))
}

fn with_query(uri: &Uri, query: &str) -> std::result::Result<Uri, HttpError> {
    let path = format!("{}?{query}", uri.path());
    let mut parts = uri.clone().into_parts();
    let wrong = |error| HttpError::new(HttpErrorKind::Request, error);
    parts.path_and_query = Some(path.parse().map_err(wrong)?);
    Uri::from_parts(parts).map_err(|error| HttpError::new(HttpErrorKind::Request, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_no_path_can_have_are_marked_and_come_back() {
        for key in ["a//b.png", "/a.png", "a/../b.png", "./a", "a/b\u{7f}.png"] {
            let marked = marked(key);
            assert!(object_store::path::Path::parse(&marked).is_ok(), "{key}");
            assert_eq!(odd_key(&marked).as_deref(), Some(key));
        }
        assert_eq!(odd_key(&marked("a&#10;b&#xD;")).as_deref(), Some("a\nb\r"));
        for key in ["a/b.png", "dir/", "a..b/.c", "é &#233;&amp;.png"] {
            assert_eq!(marked(key), key);
            assert_eq!(odd_key(key), None);
        }
    }

    #[test]
    fn only_keys_of_a_listing_change() {
        let page = "<L><Prefix>a//</Prefix><Key>a//b</Key><Name>c</Name><Key>d/</Key></L>";
        let expected =
            "<L><Prefix>a//</Prefix><Key>a/\u{f8f0}/b</Key><Name>c</Name><Key>d/</Key></L>";
        assert_eq!(marked_listing(page), expected);
    }
}
