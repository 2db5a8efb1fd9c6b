# Build on the builder's own platform and cross-compile: Go needs no emulator for another target.
# Builders without BuildKit (Cloud Build's docker, kaniko) set no BUILDPLATFORM; they run on amd64.
# The version is that of go.mod.
FROM --platform=${BUILDPLATFORM:-linux/amd64} golang:1.26 AS build
WORKDIR /src

# A layer of its own, which changes only with the dependencies.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
# Where these are not given they are empty, and go builds for the platform it runs on.
ARG TARGETOS
ARG TARGETARCH
# Without cgo the binary is static, as the final image has no libc; -s -w leaves out what only debuggers read.
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w" -o /todo-app .

# CA certificates, with which Neon is verified, a user that is not root (65532), and no shell. For
# that reason there is no HEALTHCHECK: the platform asks GET /health/live.
FROM gcr.io/distroless/static-debian13:nonroot
COPY --from=build /todo-app /todo-app
# The default of PORT.
EXPOSE 8080
# A list, not a string: the service is process 1 and gets the platform's SIGTERM itself.
ENTRYPOINT ["/todo-app"]
