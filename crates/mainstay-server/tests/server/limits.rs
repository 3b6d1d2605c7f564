//! Clients that are too slow or send too much do no harm: they are answered or cut off, and others are served meanwhile.

use std::sync::Arc;

use crate::support::Server;
use mainstay_control::SystemClock;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

async fn impatient() -> Server {
    Server::start_with(Arc::new(SystemClock), |config| config.request_timeout_seconds = 1).await
}

/// All that the server says until it hangs up.
async fn until_the_end(mut stream: TlsStream<TcpStream>) -> String {
    let mut said = Vec::new();
    // Without a farewell of TLS, as whoever is cut off.
    if let Err(error) = stream.read_to_end(&mut said).await {
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
    }
    String::from_utf8(said).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_ends_a_request_is_cut_off_and_others_are_served() {
    let server = impatient().await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        let mut head = server.connect().await;
        head.write_all(b"GET /subscriptions HTTP/1.1\r\nhost: localhost\r\nx-").await.unwrap();
        slow.push(head);
    }
    let mut body = server.connect().await;
    let request = format!(
        "PUT {} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: 100\r\n\r\n{{",
        server.at("replicationFabrics/slow"),
        server.token
    );
    body.write_all(request.as_bytes()).await.unwrap();
    let listed: Value = server.administrator.get("/subscriptions").await.unwrap();
    assert_eq!(listed["value"].as_array().unwrap().len(), 1);
    for stream in slow {
        let said = until_the_end(stream).await;
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 408"), "{said}");
    }
    let said = until_the_end(body).await;
    assert!(said.starts_with("HTTP/1.1 408") && said.contains("RequestTimeout"), "{said}");
    // On a new connection: the one before has been idle for as long as the server allows, and is closed about now.
    let later = server.client(&server.token);
    let fabric: Result<Value, _> = later.get(&server.at("replicationFabrics/slow")).await;
    assert_eq!(fabric.unwrap_err().status(), Some(404));
    server.running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_is_refused_before_it_is_read() {
    let server = impatient().await;
    let path = server.at("replicationFabrics/large");
    // What is announced is enough. None of it is sent: the server hangs up on what it does not read, and whoever is still
    // writing then may not see the answer.
    for announced in [(1 << 20) + 1, 9_999_999_999_999_u64] {
        let mut liar = server.connect().await;
        let request = format!(
            "PUT {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: {announced}\r\n\r\n",
            server.token
        );
        liar.write_all(request.as_bytes()).await.unwrap();
        let said = until_the_end(liar).await;
        assert!(said.starts_with("HTTP/1.1 413"), "{said}");
    }
    let mut head = server.connect().await;
    let request = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    // The server may hang up in the middle of it.
    let _ = head.write_all(request.as_bytes()).await;
    let said = until_the_end(head).await;
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    let listed: Value = server.administrator.get("/subscriptions").await.unwrap();
    assert_eq!(listed["value"].as_array().unwrap().len(), 1);
    server.running.stop().await;
}
