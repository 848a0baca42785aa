-- GET with 20 header fields of which path, query, traceparent, x-request-id, cookie, and with them
-- the length of the head, are others in every request. Arguments: fields to add to each.

local format, random, sub = string.format, math.random, string.sub
local letters = string.rep("abcdefghijklmnopqrstuvwxyz0123456789", 8)
local fixed

function init(arguments)
    math.randomseed(os.time())
    for _ = 1, 10 do random() end
    fixed = {
        "Host: shop.example.test",
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko)",
        "Accept: application/json, text/plain;q=0.9, */*;q=0.5",
        "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
        "Cache-Control: no-cache",
        "Referer: https://shop.example.test/orders",
        "Origin: https://shop.example.test",
        "X-Forwarded-Host: shop.example.test",
        "X-Tenant: blue",
        "X-Client-Version: 4.18.2",
        "X-Feature-Flags: new-basket, fast-search, no-banner",
        "If-None-Match: \"5f2d7c3b1a\"",
        "Sec-Fetch-Site: same-origin",
        "Sec-Fetch-Mode: cors",
        "Sec-Fetch-Dest: empty",
        "DNT: 1",
    }
    for _, field in ipairs(arguments) do fixed[#fixed + 1] = field end
    fixed = table.concat(fixed, "\r\n")
end

local function hex(digits)
    return format("%08x%08x%08x%08x", random(0, 2147483647), random(0, 2147483647),
        random(0, 2147483647), random(0, 2147483647)):sub(1, digits)
end

function request()
    local id = hex(32)
    return format(
        "GET /orders/%d/items/%s?page=%d&sort=%s HTTP/1.1\r\n%s\r\n"
            .. "traceparent: 00-%s-%s-01\r\nx-request-id: %s\r\ncookie: session=%s; seen=%d\r\n"
            .. "x-note: %s\r\n\r\n",
        random(1, 99999999), sub(id, 1, random(4, 20)), random(1, 9999), sub(id, 5, 12), fixed,
        id, sub(id, 9, 24), sub(id, 3, 30), sub(letters, random(1, 30), random(60, 200)),
        random(1, 9999999), sub(letters, 1, random(1, 100)))
end
