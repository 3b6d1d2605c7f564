//! How the agent fares, over plain HTTP to whoever asks on this host: `/metrics` for Prometheus, `/readyz`.

use std::{convert::Infallible, time::Duration};

use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, sync::watch};

/// A connection may take so long. They are served one after the other: a monitor asks every few seconds.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// A listener that fails, because the process has no descriptors left, is asked again after a pause.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Answers for ever.
pub(crate) async fn serve(listener: TcpListener, connected: watch::Receiver<bool>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection to the agent's metrics was not taken");
                tokio::time::sleep(RETRY_PAUSE).await;
                continue;
            }
        };
        let service = service_fn(|request: Request<Incoming>| {
            let is_connected = *connected.borrow();
            async move { Ok::<_, Infallible>(answer(request.uri().path(), is_connected)) }
        });
        let mut connection = http1::Builder::new();
        let connection = connection.keep_alive(false).serve_connection(TokioIo::new(stream), service);
        // Whoever goes away, or asks nothing, has no answer.
        let _ = tokio::time::timeout(ANSWER_MAX, connection).await;
    }
}

fn answer(path: &str, is_connected: bool) -> Response<String> {
    let (status, text) = match (path, is_connected) {
        ("/metrics", _) => (StatusCode::OK, metrics(is_connected)),
        ("/readyz", true) => (StatusCode::OK, "ready\n".to_owned()),
        ("/readyz", false) => (StatusCode::SERVICE_UNAVAILABLE, "the server is not connected\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there are /metrics and /readyz\n".to_owned()),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn metrics(is_connected: bool) -> String {
    format!(
        "# HELP mainstay_agent_info The agent's version.\n\
         # TYPE mainstay_agent_info gauge\n\
         mainstay_agent_info{{version=\"{}\"}} 1\n\
         # HELP mainstay_agent_connected Whether the server is connected.\n\
         # TYPE mainstay_agent_connected gauge\n\
         mainstay_agent_connected {}\n",
        env!("CARGO_PKG_VERSION"),
        u8::from(is_connected)
    )
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    #[tokio::test]
    async fn whoever_asks_is_told_whether_the_server_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (told, connected) = watch::channel(false);
        let serving = tokio::spawn(serve(listener, connected));
        let ask = async |path: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            text
        };
        assert!(ask("/readyz").await.starts_with("HTTP/1.1 503"));
        assert!(ask("/metrics").await.contains("\nmainstay_agent_connected 0\n"));
        told.send_replace(true);
        assert!(ask("/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(ask("/metrics").await.contains("\nmainstay_agent_connected 1\n"));
        assert!(ask("/").await.starts_with("HTTP/1.1 404"));
        serving.abort();
    }
}
